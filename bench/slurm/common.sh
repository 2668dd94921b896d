# shellcheck shell=bash
# What the job scripts of this folder share: environment, folders, stripes. Sourced after the #SBATCH lines.
#
#   CASCADE_CHECKOUT   this repository on a file system that compute nodes see (default: where sbatch was called)
#   CASCADE_VENV       environment with cascade_aio[mpi,bench] and mpi4py of the site's MPI (default: $CASCADE_CHECKOUT/.venv)
#   CASCADE_SCRATCH    folder on Lustre for roots and results (default: $SCRATCH/cascade)
#
# mpi4py must be built against the MPI of the machine, not taken as a wheel with another one in it:
#   module load python cray-mpich     # Perlmutter: PrgEnv-gnu and cray-mpich are loaded by default
#   python -m venv "$CASCADE_VENV" && . "$CASCADE_VENV/bin/activate"
#   MPICC="cc -shared" pip install --no-cache-dir --no-binary=mpi4py mpi4py
#   pip install -e "$CASCADE_CHECKOUT[bench]"
set -euo pipefail

CASCADE_CHECKOUT=${CASCADE_CHECKOUT:-${SLURM_SUBMIT_DIR:-$PWD}}
CASCADE_VENV=${CASCADE_VENV:-$CASCADE_CHECKOUT/.venv}
CASCADE_SCRATCH=${CASCADE_SCRATCH:-${SCRATCH:?set SCRATCH or CASCADE_SCRATCH to a folder on a shared file system}/cascade}

if command -v module >/dev/null 2>&1; then
    module load "${CASCADE_PYTHON_MODULE:-python}"
fi
# shellcheck disable=SC1091
. "$CASCADE_VENV/bin/activate"
cd "$CASCADE_CHECKOUT"

# One store per job. Large blocks in segment files of 1 GiB: wide stripes from the first byte on. The store stripes its
# writers' folders itself (stripe_count, stripe_bytes); this makes the rest of the root alike.
ROOT=$CASCADE_SCRATCH/$SLURM_JOB_ID
RESULTS=$CASCADE_SCRATCH/results
mkdir -p "$ROOT" "$RESULTS"
if command -v lfs >/dev/null 2>&1 && lfs getstripe -d "$ROOT" >/dev/null 2>&1; then
    lfs setstripe -c "${CASCADE_STRIPE_COUNT:-16}" -S "${CASCADE_STRIPE_SIZE:-4m}" "$ROOT"
fi
trap 'rm -rf "$ROOT"' EXIT

# The tier's calls come from a thread of their own, beside the benchmark's.
export MPICH_MAX_THREAD_SAFETY=multiple
# Host memory only: the windows are arenas, GPU buffers never go through MPI.
export MPICH_GPU_SUPPORT_ENABLED=0
# Ranks of one node read each other through shared memory, of other nodes by RDMA over Slingshot.
export MPICH_OFI_NIC_POLICY=${MPICH_OFI_NIC_POLICY:-NUMA}
# Memory that the network registers may be large: no lazy unregistering behind our back.
export FI_MR_CACHE_MONITOR=${FI_MR_CACHE_MONITOR:-userfaultfd}
# Python's own threads are for hashing and copying: leave them the cores that --cpus-per-task gives.
export OMP_NUM_THREADS=1
