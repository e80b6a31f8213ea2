"""Imported last by the process that children are forked from: nothing it has is garbage, and none looks it through."""

import gc

gc.collect()
gc.freeze()
