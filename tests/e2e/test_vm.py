"""The VM process and the host around it: vCPU counts, both kernel formats, the jail."""

import subprocess

import pytest
from conftest import MICA, PATIENCE_S, lab, make, run, template_folder
from inside import process_of

SLOW = {"request_timeout": PATIENCE_S}


def counts_its_vcpus(template: str, vcpus: int) -> None:
    sandbox = make(template)
    try:
        assert run(sandbox, "nproc") == f"{vcpus}\n"
        # Each of them runs, also after the restore.
        for cpu in range(vcpus):
            assert run(sandbox, f"taskset -c {cpu} echo $((6 * 7))") == "42\n"
    finally:
        sandbox.kill(**SLOW)


def test_one_and_two_vcpus(tiny):
    counts_its_vcpus(tiny, 1)
    counts_its_vcpus("base", 2)


def test_eight_vcpus(variant):
    counts_its_vcpus(variant("vcpus-8", vcpus=8), 8)


def test_four_vcpus_and_an_elf_vmlinux(variant):
    """The kernel of `base`, as the ELF file that is packed in it: boots, and is restored."""
    counts_its_vcpus(variant("elf", kernel=vmlinux(), vcpus=4), 4)


def vmlinux() -> bytes:
    """The ELF inside the base template's bzImage: its zstd payload, unpacked."""
    image = subprocess.run(
        [MICA, "lab", "exec", "--", "cat", f"{template_folder('base')}/kernel"],
        capture_output=True,
        check=True,
    ).stdout
    start = image.index(b"\x28\xb5\x2f\xfd")
    unpacked = subprocess.run(["zstd", "-dcq"], input=image[start:], capture_output=True).stdout
    assert unpacked.startswith(b"\x7fELF")
    return unpacked


def test_the_devices_are_found_through_acpi(base):
    command = "cat /proc/cmdline; ls /sys/bus/virtio/devices; cat /sys/class/misc/hw_random/rng_current"
    result = base.commands.run(command, timeout=PATIENCE_S, **SLOW).stdout
    assert "virtio_mmio.device" not in result
    assert "virtio0" in result
    acpi = base.commands.run("ls -d /sys/bus/acpi/devices/LNRO0005:*", timeout=PATIENCE_S, **SLOW)
    assert len(acpi.stdout.split()) >= 3
    assert "virtio_rng" in result


def test_the_disk_holds_what_is_synced(base):
    result = base.commands.run(
        "dd if=/dev/urandom of=blob bs=1M count=32 conv=fsync 2>/dev/null && md5sum < blob && "
        "echo 3 | sudo tee /proc/sys/vm/drop_caches >/dev/null && md5sum < blob && rm blob",
        timeout=PATIENCE_S,
        **SLOW,
    )
    first, second = result.stdout.split("  -\n")[:2]
    assert first == second


def test_the_vm_process_is_jailed(base):
    pid = process_of(base.sandbox_id)
    status = dict(
        line.split(":\t", 1) for line in lab(f"cat /proc/{pid}/status").splitlines() if ":\t" in line
    )
    uids = set(status["Uid"].split())
    assert len(uids) == 1 and int(uids.pop()) >= 1000
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == 0 and int(status["CapPrm"], 16) == 0
    modes = lab(f"grep -h ^Seccomp: /proc/{pid}/task/*/status").split()
    assert set(modes) == {"Seccomp:", "2"}
    assert lab(f"ls -A /proc/{pid}/root").strip() == ""
    own, host = lab(f"readlink /proc/{pid}/ns/net /proc/1/ns/net").split()
    assert own != host
    opened = lab(f"ls -l /proc/{pid}/fd").splitlines()[1:]
    targets = [line.split(" -> ")[1] for line in opened]
    allowed = ("socket:", "anon_inode:", "/dev/kvm", "/memfd:", "/dev/null", "pipe:")
    files = [t for t in targets if not t.startswith(allowed)]
    assert all("/sandboxes/" in f or "/templates/" in f or f.endswith("/disk") for f in files), files


def test_two_sandboxes_have_two_users(base):
    other = make("base")
    try:
        uids = lab("for p in $(pgrep -x mica-vm); do stat -c %u /proc/$p/task; done").split()
        assert len(uids) == len(set(uids)) >= 2
    finally:
        other.kill(**SLOW)
