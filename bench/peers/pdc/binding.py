"""PDC's C API by cffi, compiled against the installation's own ``pdc.h``: the compiler checks every declaration.

Must not be imported where ``cffi`` is not (it is in the peer's own environment).
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any

import cffi

from bench.peers.protocol import CannotRunError

DIRECTORY_VARIABLE = "PDC_DIR"
MODULE = "_cascade_bench_pdc"

DECLARATIONS = """
typedef int perr_t;
typedef uint64_t pdcid_t;
typedef unsigned long long psize_t;
typedef enum { PDC_NA, PDC_READ, PDC_WRITE, ... } pdc_access_t;
typedef enum { PDC_CONT_CREATE, PDC_OBJ_CREATE, ... } pdc_prop_type_t;
typedef enum { PDC_UINT8, ... } pdc_c_var_type_t;
pdcid_t PDCinit(const char *pdc_name);
perr_t PDCclose(pdcid_t pdcid);
pdcid_t PDCprop_create(pdc_prop_type_t type, pdcid_t pdc_id);
perr_t PDCprop_close(pdcid_t id);
perr_t PDCprop_set_obj_dims(pdcid_t obj_prop, int ndim, uint64_t *dims);
perr_t PDCprop_set_obj_type(pdcid_t obj_prop, pdc_c_var_type_t type);
pdcid_t PDCcont_create(const char *cont_name, pdcid_t cont_create_prop);
pdcid_t PDCcont_open(const char *cont_name, pdcid_t pdc_id);
perr_t PDCcont_close(pdcid_t cont_id);
pdcid_t PDCobj_create(pdcid_t cont_id, const char *obj_name, pdcid_t obj_create_prop);
pdcid_t PDCobj_open(const char *obj_name, pdcid_t pdc_id);
perr_t PDCobj_close(pdcid_t obj_id);
perr_t PDCobj_del(pdcid_t obj_id);
perr_t PDCobj_flush_all_start(void);
pdcid_t PDCregion_create(psize_t ndims, uint64_t *offset, uint64_t *size);
perr_t PDCregion_close(pdcid_t region_id);
pdcid_t PDCregion_transfer_create(void *buf, pdc_access_t access_type, pdcid_t obj_id,
                                  pdcid_t local_reg, pdcid_t remote_reg);
perr_t PDCregion_transfer_start_all(pdcid_t *transfer_request_id, int size);
perr_t PDCregion_transfer_wait_all(pdcid_t *transfer_request_id, int size);
perr_t PDCregion_transfer_close(pdcid_t transfer_request_id);
int bench_mpi_begin(void);
"""
SOURCE = """
#include "pdc.h"
/* A library built with MPI calls it in PDCinit; one process of its own is a valid MPI job. */
static int bench_mpi_begin(void)
{
#ifdef ENABLE_MPI
    int begun = 0;
    MPI_Initialized(&begun);
    return begun ? 0 : MPI_Init(NULL, NULL);
#else
    return 0;
#endif
}
"""


def installation() -> pathlib.Path:
    """The folder that ``PDC_DIR`` names. Raises ``CannotRunError`` if there is no PDC in it."""
    named = os.environ.get(DIRECTORY_VARIABLE)
    if not named:
        raise CannotRunError(f"{DIRECTORY_VARIABLE} is not set: it names an installation of PDC")
    folder = pathlib.Path(named).resolve()
    for part in ("bin/pdc_server", "bin/close_server", "include/pdc.h"):
        if not (folder / part).exists():
            raise CannotRunError(f"{DIRECTORY_VARIABLE} names a folder without {part}")
    return folder


def version(folder: pathlib.Path) -> str:
    """What the installation's CMake files say; the library itself does not tell. Raises ``CannotRunError``."""
    for path in sorted(folder.rglob("pdc-config*.cmake")):
        if found := re.search(r"PDC_VERSION_STRING\s+\"?([0-9][^\s\")]*)", path.read_text(errors="replace")):
            return found.group(1)
    raise CannotRunError("the installation of PDC does not say its version (share/cmake/**/pdc-config*.cmake)")


def load(folder: pathlib.Path) -> tuple[Any, Any]:
    """``ffi`` and ``lib``. Raises ``CannotRunError`` if the binding cannot be compiled or ``libpdc`` not be loaded."""
    if MODULE in sys.modules:
        return sys.modules[MODULE].ffi, sys.modules[MODULE].lib
    libraries = [str(path) for path in (folder / "lib", folder / "lib64") if path.is_dir()]
    builder = cffi.FFI()
    builder.cdef(DECLARATIONS)
    builder.set_source(
        MODULE,
        SOURCE,
        include_dirs=[str(folder / "include")],
        libraries=["pdc"],
        library_dirs=libraries,
        runtime_library_dirs=libraries,
    )
    if "CC" not in os.environ and (compiler := shutil.which("mpicc")):
        os.environ["CC"] = compiler
    with tempfile.TemporaryDirectory(prefix="cascade-bench-pdc-") as place:
        try:
            path = builder.compile(tmpdir=place, verbose=False)
            specification = importlib.util.spec_from_file_location(MODULE, path)
            assert specification is not None
            assert specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(module)
        except Exception as error:  # setuptools' and the loader's own types; the reason is in the text
            raise CannotRunError(f"PDC's C API cannot be bound: {error}") from error
    sys.modules[MODULE] = module
    return module.ffi, module.lib
