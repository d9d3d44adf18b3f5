// Opens the folded prompt that a link leads into; everything else works without scripts.
function reveal() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.closest("details");
  if (folded && !folded.open) { folded.open = true; }
  if (folded && target) { target.scrollIntoView({ block: "center" }); target.setAttribute("tabindex", "-1"); target.focus({ preventScroll: true }); }
}
addEventListener("hashchange", reveal);
addEventListener("DOMContentLoaded", reveal);
