def create_bucket_model(*arguments, **keywords):
    raise RuntimeError("not part of the fake SDK")
