from anyo_lightning.internals import without_bitsandbytes

with without_bitsandbytes():  # before any module here imports it as a whole
    import peft as peft
