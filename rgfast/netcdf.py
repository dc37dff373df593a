"""NetCDF files by way of memory: HDF5 itself never writes to a file system.

HDF5 cannot close a file whose last bytes found no room, and takes the process with it.
"""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import xarray as xr

from rgfast.files import write_bytes

__all__ = ["read_netcdf", "read_result", "write_netcdf"]


def write_netcdf(path: str | Path, dataset: xr.Dataset, **groups: xr.Dataset) -> None:
    """Write ``dataset``, and each of ``groups`` under its name, to ``path`` (NetCDF 4), atomically.

    Takes as much memory as the file. Errors are those of :func:`rgfast.files.write_stream`.
    """
    import h5netcdf  # here, so that measuring asks for no HDF5
    from xarray.backends import H5NetCDFStore

    buffer = io.BytesIO()
    with h5netcdf.File(buffer, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
        for name, group in groups.items():
            group.dump_to_store(H5NetCDFStore(file, group=name, mode="a"))
    write_bytes(path, buffer.getbuffer())


def read_netcdf(path: str | Path, group: str | None = None) -> xr.Dataset:
    """The dataset, or one group, of the file that :func:`write_netcdf` wrote to ``path``, in memory.

    Raises FileNotFoundError if there is no file, and ValueError, naming it, if it is truncated or of another
    kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    try:
        with xr.open_dataset(path, group=group, engine="h5netcdf") as file:
            dataset: xr.Dataset = file.load()
    except Exception as error:  # h5py and h5netcdf raise a dozen types for damaged files
        raise ValueError(f"{path} is truncated or not a NetCDF file: {error}") from error
    return dataset


def read_result(path: str | Path, form: str, version: int, what: str) -> xr.Dataset:
    """The dataset of a result of the format ``form``, up to ``version``; ``what`` is what messages call it.

    Raises FileNotFoundError if there is no file, ValueError for a truncated one, one of another kind and one
    that a newer version wrote.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be {what}, and there is no file {path}")
    dataset = read_netcdf(path)
    if dataset.attrs.get("format") != form:
        raise ValueError(f"{path} is a NetCDF file but not {what} (no format {form!r} in it)")
    written = int(dataset.attrs.get("format_version", 0))
    if written > version:
        raise ValueError(
            f"{path} was written by a newer rgfast (format {written}; this one reads up to {version})"
        )
    return dataset
