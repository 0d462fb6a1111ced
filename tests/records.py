"""Made-up records of the bench."""

import common


def make_record(case="36x48x48/6,6,1", op=common.OURS, ms=10.0, **fields):
    grid = (36, 48, 48)
    base = dict(case=case, op=op, grid=grid, heads=24, head_dim=128, batch=1, layout="NHD", tile=(6, 8, 8))
    return common.Record(**base | dict(window=(6, 6, 1), density=1 / 6, ms=ms) | fields)
