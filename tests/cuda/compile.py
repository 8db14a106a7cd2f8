"""Compiles attn_cuda.cuh for one architecture: in silence, within 3 GB, exporting attn_ names only.

compile.py ARCH OBJECT COMMAND...   COMMAND compiles to OBJECT; says the CPU time and the memory
that it took. Ends with "N passed, N failed"."""
import resource
import subprocess
import sys

arch, out, command = sys.argv[1], sys.argv[2], sys.argv[3:]
passed = failed = 0


def check(ok, text):
    global passed, failed
    if ok:
        passed += 1
    else:
        failed += 1
        print(f"failed: {text}")


run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
use = resource.getrusage(resource.RUSAGE_CHILDREN)
mib = use.ru_maxrss // 1024
print(f"sm_{arch}: {use.ru_utime + use.ru_stime:.1f} CPU seconds, {mib} MiB at most")
check(run.returncode == 0, f"sm_{arch} does not compile")
check(not run.stdout.strip(), f"sm_{arch}: the compiler had something to say")
for line in run.stdout.splitlines()[:30]:
    print("    " + line[:200])
check(mib <= 3 * 1024, f"sm_{arch} takes more than 3 GB to compile")
if run.returncode == 0:
    names = subprocess.run(["nm", "-g", "--defined-only", out], capture_output=True, text=True)
    foreign = [w[2] for w in map(str.split, names.stdout.splitlines())
               if len(w) == 3 and not w[2].startswith(("attn_", "DW.ref."))]  # DW: the compiler's
    check(names.returncode == 0 and "attn_cuda_run" in names.stdout, f"{out} lacks attn_cuda_run")
    check(not foreign, f"private names escape: {foreign[:5]}")
print(f"{passed} passed, {failed} failed")
sys.exit(failed != 0)
