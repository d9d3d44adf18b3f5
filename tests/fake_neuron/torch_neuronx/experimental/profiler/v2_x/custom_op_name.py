def hlo_debug(*arguments, **keywords):
    return None
