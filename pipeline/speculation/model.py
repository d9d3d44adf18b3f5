"""One model of a pair inside a graph: passes over its caches, logits, and the choice of tokens.

Shapes: B rows, T tokens, S attended cache length, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.models.config import ModelConfig
from pipeline.models.decoder import Hidden, Weights, hidden_states
from pipeline.models.parallel import Attend, Block, Pass, Seams, State, Writes, attend_up_to, first_cache, plan_writes
from pipeline.models.recurrence import Recurrence, plan_recurrence
from pipeline.models.vocabulary import logits
from pipeline.models.weights import BASE, D2T, OFFSET, RECENT
from pipeline.speculation.sampling import Sampling, Vocabulary, greedy, sample
from pipeline.speculation.shaping import LogProbs, Shaping, Share, log_probs, shape


@dataclass(frozen=True)
class Choose:
    """How a graph picks tokens: greedily, or by `sampling` from the best `keep` candidates (None: all tokens).

    `copied` int32 [B, K] are tokens to propose instead of the draft's own, -1 for none. `shaping` is what the rows ask
    of the target's scores, whose `logprobs` most probable tokens are reported.
    """

    sampling: Sampling | None = None
    keep: int | None = None
    copied: Tensor | None = None
    shaping: Shaping | None = None
    logprobs: int = 0

    def at(self, step: int) -> Choose:
        """Return the choice of one draft step: its copied token, [B, 1]."""
        return replace(self, copied=None if self.copied is None else self.copied[:, step : step + 1])


@dataclass(frozen=True)
class Prompt:
    """Right-padded prompts, or the next chunks of prompts: tokens and positions int [B, T].

    `lengths_B` int, tokens of each row (0 for rows that have none), `slots_B` int, distinct cache rows. With `kv` a row
    attends over that many positions of its slot, which hold what was before; 0: rows are empty and attend to the pass's
    own keys.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    lengths_B: Tensor
    slots_B: Tensor
    kv: int = 0

    @property
    def active(self) -> Tensor:
        """Rows that have a prompt."""
        return self.lengths_B > 0

    @property
    def live(self) -> Tensor:
        """Tokens that are not padding, bool [B, T]."""
        return torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device) < self.lengths_B[:, None]

    @property
    def last(self) -> Tensor:
        """Index of each row's last token, int64."""
        return (self.lengths_B.long() - 1).clamp(0, self.tokens_BT.shape[1] - 1)

    @property
    def following(self) -> Tensor:
        """Position after each row's last token."""
        return self.positions_BT.gather(1, self.last[:, None])[:, 0] + 1

    @property
    def attend(self) -> Attend:
        """What the queries of a pass over the prompts see."""
        if self.kv:
            seen_BT = torch.where(self.live, self.positions_BT, 0)  # padding sees the first key: it takes no time
            return attend_up_to(seen_BT, self.kv, self.slots_B)
        return attend_up_to(self.positions_BT[:1])

    def kept(self, model: Model, less: int = 0) -> Tensor:
        """Return which tokens are stored, bool [B, T]: all that are not padding, but for the last `less`."""
        index_T = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device)
        usable = model.usable(self.kv or self.tokens_BT.shape[1])
        return (index_T < self.lengths_B[:, None] - less) & (self.positions_BT < usable)

    def writes(self, model: Model, less: int = 0) -> Writes:
        """Return the writes of the tokens that are stored."""
        kept_BT = self.kept(model, less)
        block: Block = "any" if self.kv else "first"
        return plan_writes(model.state, self.slots_B, self.positions_BT, kept_BT, block, model.length)


def recurrence_of(
    config: ModelConfig, state: State, rows_B: Tensor, positions_BT: Tensor, keep_BT: Tensor
) -> Recurrence | None:  # fmt: skip
    """Return how a pass continues the recurrent states of a model; None without recurrent layers."""
    net = config.delta_net
    if net is None:
        return None
    recent = next(tensor for name, tensor in state.items() if name.startswith(f"{RECENT}."))
    sizes = (net.kernel - 1, recent.shape[1] - net.kernel + 1)
    return plan_recurrence(state[BASE], rows_B.long(), positions_BT[:, 0], keep_BT, sizes)


@dataclass(frozen=True)
class Rows:
    """Cache rows 0..B-1 between steps: their last token and its position, int32 [B]; `alive_B` bool, rows that run.

    The last token is not in the caches yet. `kv` is the attended length.
    """

    last_B: Tensor
    position_B: Tensor
    alive_B: Tensor
    kv: int

    @property
    def index(self) -> Tensor:
        """Cache rows, int64."""
        return torch.arange(self.last_B.shape[0], device=self.last_B.device)


@dataclass(frozen=True)
class Model:
    """One model of a pair inside a graph: its config, this rank's weights, its caches and its backend seams.

    `partner_vocab` is set for a draft whose `vocab_size` is padded differently from its target's. The draft then never
    proposes an id that the target lacks. It reads an id that it lacks as its own last id: the acceptance rate can fall,
    the output stays the same. `length` is that of caches that are not rings (None: of the first layer's).
    """

    config: ModelConfig
    weights: Weights
    state: State
    seams: Seams
    partner_vocab: int | None = None
    taps: tuple[int, ...] = ()
    length: int | None = None

    def hidden(
        self, tokens_BT: Tensor, positions_BT: Tensor, active_B: Tensor, kv: int, live_BT: Tensor | None = None
    ) -> Hidden:  # fmt: skip
        """Run rows 0..B-1 over their caches; a query attends to keys at or before its own position.

        `live_BT` bool are the tokens of rows that are read: the first ones (None: all).
        """
        rows_B = torch.arange(tokens_BT.shape[0], device=tokens_BT.device)
        active_BT = active_B[:, None].expand_as(tokens_BT)
        live_BT = active_BT if live_BT is None else active_BT & live_BT
        keep_BT = live_BT & (positions_BT < self.usable(kv))
        writes = plan_writes(self.state, rows_B, positions_BT, keep_BT, length=self.length)
        recurrence = recurrence_of(self.config, self.state, rows_B, positions_BT, keep_BT)
        attend = attend_up_to(positions_BT, kv)
        return self.run(tokens_BT, Pass(positions_BT, self.state, writes, attend, live_BT, recurrence))

    def read(self, prompt: Prompt) -> Hidden:
        """Run prompts into their slots."""
        writes = prompt.writes(self)
        recurrence = recurrence_of(self.config, self.state, prompt.slots_B, prompt.positions_BT, prompt.kept(self))
        run = Pass(prompt.positions_BT, self.state, writes, prompt.attend, prompt.live, recurrence)
        return self.run(prompt.tokens_BT, run)

    def run(self, tokens_BT: Tensor, run: Pass) -> Hidden:
        """Run all layers over tokens of the pair's common tokenizer."""
        return hidden_states(self.config, self.weights, self.seams, self.readable(tokens_BT), run, self.taps)

    def of_live(self, live_BT: Tensor) -> Model:
        """Return the model in passes that need the linear layers of these tokens alone, bool [B, T]."""
        return replace(self, seams=self.seams.of_live(live_BT))

    def within(self, rows: Rows) -> Rows:
        """Return `rows` without those whose last token has no position left in the bucket."""
        return replace(rows, alive_B=rows.alive_B & (rows.position_B < self.usable(rows.kv)))

    def readable(self, tokens_BT: Tensor) -> Tensor:
        """Clamp tokens to ids that this model's embedding has."""
        if self.partner_vocab is not None and self.partner_vocab > self.config.vocab:
            return tokens_BT.clamp(0, self.config.vocab - 1)
        return tokens_BT

    def usable(self, kv: int) -> int:
        """Return how many positions of a bucket hold tokens; the cache's last is scratch (see `plan_writes`)."""
        return min(kv, (self.length or first_cache(self.state).shape[2]) - 1)

    @property
    def proposable(self) -> int:
        """Number of ids of the output vocabulary that both models of the pair have."""
        return min(self.config.out_vocab, self.partner_vocab or self.config.out_vocab)

    def logits(self, hidden_BTH: Tensor, limit: int | None = None) -> Tensor:
        """Return this rank's logits, float32 [B, T, V / tp]; -inf from id `limit` on."""
        return logits(self.config, self.weights, self.seams, hidden_BTH, limit)

    def all_logits(self, hidden_BTH: Tensor) -> Tensor:
        """Return the logits of the whole vocabulary, float32 [B, T, V]."""
        return self.seams.all_gather(self.logits(hidden_BTH))[..., : self.config.out_vocab]

    def next(self, hidden_BTH: Tensor, positions_BT: Tensor, choose: Choose) -> Tensor:
        """Choose the tokens at `positions_BT`, int64 [B, T], as ids of the target."""
        return self.chosen(self.logits(hidden_BTH, self.limit(choose)), positions_BT, choose)

    def limit(self, choose: Choose) -> int | None:
        """Return the id from which logits to choose from are -inf; None where these are cut off."""
        return None if choose.sampling is not None and choose.keep is None else self.proposable

    def chosen(self, logits_BTV: Tensor, positions_BT: Tensor, choose: Choose) -> Tensor:
        """Choose the tokens at `positions_BT` by this rank's logits up to `limit`, as `next`."""
        if choose.sampling is None:
            return self.to_target(greedy(logits_BTV, self.seams, self.weights.get(OFFSET)))
        if choose.keep is None:
            logits_BTV = self.seams.all_gather(logits_BTV)[..., : self.proposable]
        ids_V = torch.arange(self.proposable, dtype=torch.int32, device=logits_BTV.device)
        of = Vocabulary(choose.keep, self.seams, self.weights.get(OFFSET))
        return self.to_target(sample(logits_BTV, choose.sampling, positions_BT, self.to_target(ids_V).int(), of))

    def next_shaped(
        self, hidden_BTH: Tensor, positions_BT: Tensor, drafts_BK: Tensor, choose: Choose
    ) -> tuple[Tensor, LogProbs]:
        """Choose the target's tokens at `positions_BT`, int64 [B, T], as the rows ask.

        A rank has the scores of its share of the vocabulary, or of all of it if all are candidates.
        """
        assert choose.shaping is not None
        assert choose.sampling is not None
        if self.seams.tp == 1 or choose.keep is None:
            logits_BTV, share = self.all_logits(hidden_BTH), Share(self.seams)
        else:
            logits_BTV = self.logits(hidden_BTH)
            share = Share(self.seams, logits_BTV.shape[-1], self.weights[OFFSET])
        scores_BTV = shape(logits_BTV, choose.shaping, drafts_BK, choose.sampling.temperature_B, share)
        ids_V = torch.arange(self.config.out_vocab, dtype=torch.int32, device=logits_BTV.device)
        of = Vocabulary(choose.keep, self.seams, share.offset_1)
        chosen_BT = sample(scores_BTV, choose.sampling, positions_BT, ids_V, of)
        return chosen_BT, log_probs(logits_BTV, chosen_BT, choose.logprobs, share)

    def greedy(self, hidden_BTH: Tensor) -> Tensor:
        """Return the argmax over the ids that both models have, int64 [B, T], as ids of the target."""
        return self.to_target(greedy(self.logits(hidden_BTH, self.proposable), self.seams, self.weights.get(OFFSET)))

    def to_target(self, ids: Tensor) -> Tensor:
        """Map ids of a reduced vocabulary to the target's (EAGLE-3 convention, `d2t` offsets)."""
        return ids if self.config.draft_vocab is None else ids + self.weights[D2T][ids]
