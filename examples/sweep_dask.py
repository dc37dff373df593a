"""A sweep on a Dask cluster, here one of two processes on this machine.

    pip install 'rgfast[dask]'
    python examples/sweep_dask.py

On a real cluster give ``Client`` the scheduler's address; every worker must see the output folder, where each
point is a file as soon as it is done.
"""

import joblib
from distributed import Client

import rgfast

if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        print(client)
        with joblib.parallel_config(backend="dask"):
            print(rgfast.sweep("xi", quick=True, out="runs/sweep-dask"))
