//! The kernel and the initramfs of a template.
//!
//! Called by the build. Refuses an agent that is not a static x86-64 program, and a kernel that
//! lacks a driver the guest needs. The kernel package is unpacked, never installed.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cache::{Cache, Key};
use super::cpio::CpioWriter;
use super::debian::KernelPackage;
use super::runner::{Runner, bound_to_us};

/// The drivers a guest loads, each after what it needs. One that is built in is left out.
const MODULES: [&str; 10] = [
    "virtio",
    "virtio_ring",
    "virtio_mmio",
    "virtio_blk",
    "vsock",
    "vmw_vsock_virtio_transport_common",
    "vmw_vsock_virtio_transport",
    "rng-core",
    "virtio-rng",
    "virtio_balloon",
];
const INITRAMFS_DIRS: [&str; 9] =
    ["dev", "proc", "sys", "run", "tmp", "etc", "mnt", "newroot", "modules"];
/// Raised when the layout of a stage below changes.
const STAGES_VERSION: &str = "1";
/// The largest agent that is packed.
const AGENT_BYTES_MAX: u64 = 256 << 20;

/// The key of a kernel stage.
pub fn kernel_key(package: &KernelPackage) -> Key {
    Key::of(&[
        ("layout", STAGES_VERSION),
        ("package", &package.name),
        ("version", &package.version),
        ("modules", &MODULES.join(" ")),
    ])
}

/// The key of an initramfs stage.
pub fn initramfs_key(kernel: &Key, agent: &Key) -> Key {
    Key::of(&[("layout", STAGES_VERSION), ("kernel", kernel.as_str()), ("agent", agent.as_str())])
}

/// Gets a kernel package and takes `vmlinuz` and `modules/` out of it.
///
/// # Errors
/// When it cannot be got, or lacks something.
pub fn kernel(
    runner: &Runner,
    cache: &Cache,
    key: &Key,
    package: &KernelPackage,
) -> Result<PathBuf> {
    cache.stage(runner, "kernel", key, |out| {
        let work = cache.work_dir()?;
        let mut get = bound_to_us("apt-get");
        get.args(["download", "-q", "-o", "APT::Sandbox::User=root"])
            .arg(format!("{}={}", package.name, package.version))
            .current_dir(work.path());
        runner.run("kernel download", get)?;
        let deb = only_file(work.path(), ".deb")?;
        let tree = work.path().join("tree");
        let mut unpack = bound_to_us("dpkg-deb");
        unpack.arg("-x").arg(&deb).arg(&tree);
        runner.run("kernel unpack", unpack)?;

        let vmlinuz = only_file(&tree.join("boot"), "vmlinuz-")?;
        fs::copy(&vmlinuz, out.join("vmlinuz")).context("could not copy the kernel")?;
        collect_modules(runner, &tree, &out.join("modules"))
    })
}

/// The only entry of a directory whose name begins or ends so.
fn only_file(dir: &Path, part: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(part) || name.ends_with(part) {
            found.push(path);
        }
    }
    match (found.pop(), found.is_empty()) {
        (Some(path), true) => Ok(path),
        _ => bail!("{} does not have exactly one `{part}` file", dir.display()),
    }
}

/// Unpacks the modules of [`MODULES`] that are not built in, and writes their order.
fn collect_modules(runner: &Runner, tree: &Path, out: &Path) -> Result<()> {
    fs::create_dir(out).context("could not make the module directory")?;
    let mut files = Vec::new();
    list_files(tree, 0, &mut files)?;
    let builtin = files
        .iter()
        .find(|path| path.ends_with("modules.builtin"))
        .context("the kernel package has no modules.builtin")?;
    let builtin = fs::read_to_string(builtin).context("could not read modules.builtin")?;
    let same = |a: &str, b: &str| a.replace('-', "_") == b.replace('-', "_");
    let stem = |path: &Path| -> String {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.split(".ko").next().unwrap_or_default().to_owned()
    };
    let mut order = String::new();
    for module in MODULES {
        let is_module =
            |path: &&PathBuf| path.to_string_lossy().contains(".ko") && same(&stem(path), module);
        let Some(path) = files.iter().find(is_module) else {
            if builtin.lines().any(|line| same(&stem(Path::new(line)), module)) {
                continue;
            }
            bail!("the kernel package has no driver `{module}`, neither as a module nor built in");
        };
        let name = format!("{module}.ko");
        unpack_module(runner, path, &out.join(&name))?;
        order.push_str(&name);
        order.push('\n');
    }
    fs::write(out.join("order"), order).context("could not write the module order")
}

fn unpack_module(runner: &Runner, from: &Path, to: &Path) -> Result<()> {
    runner.check()?;
    if from.extension().is_some_and(|extension| extension == "ko") {
        return fs::copy(from, to).map(drop).context("could not copy a module");
    }
    let output = File::create(to).with_context(|| format!("could not make {}", to.display()))?;
    let status = Command::new("xz")
        .args(["--decompress", "--stdout", "--"])
        .arg(from)
        .stdout(output)
        .status()
        .context("could not start `xz`; is it installed?")?;
    if !status.success() {
        bail!("`xz` could not decompress {}", from.display());
    }
    Ok(())
}

/// Every regular file below `dir`, to a bounded depth; follows no symlink.
fn list_files(dir: &Path, depth: u32, files: &mut Vec<PathBuf>) -> Result<()> {
    const DEPTH_MAX: u32 = 16;
    for entry in fs::read_dir(dir).with_context(|| format!("could not list {}", dir.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() && depth < DEPTH_MAX {
            list_files(&entry.path(), depth + 1, files)?;
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Packs the agent and the modules into an initramfs, not compressed: under emulation and on a
/// fast disk alike, reading more costs less than decompressing.
///
/// # Errors
/// When something cannot be read or written.
pub fn initramfs(
    runner: &Runner,
    cache: &Cache,
    key: &Key,
    kernel: &Path,
    agent: &Path,
) -> Result<PathBuf> {
    cache.stage(runner, "initramfs", key, |out| {
        let program = read_agent(agent)?;
        let path = out.join("initramfs");
        let file =
            File::create(&path).with_context(|| format!("could not make {}", path.display()))?;
        let mut cpio = CpioWriter::new(BufWriter::new(file));
        for dir in INITRAMFS_DIRS {
            cpio.dir(dir)?;
        }
        cpio.char_device("dev/console", 5, 1)?;
        cpio.char_device("dev/null", 1, 3)?;
        cpio.char_device("dev/kmsg", 1, 11)?;
        cpio.file("init", 0o755, &program)?;
        let modules = kernel.join("modules");
        let order = fs::read(modules.join("order")).context("could not read the module order")?;
        for name in String::from_utf8_lossy(&order).lines() {
            let content = fs::read(modules.join(name))
                .with_context(|| format!("could not read module {name}"))?;
            cpio.file(&format!("modules/{name}"), 0o644, &content)?;
        }
        cpio.file("modules/order", 0o644, &order)?;
        cpio.finish().map(drop).with_context(|| format!("could not write {}", path.display()))
    })
}

/// Reads the agent, and checks that it can run where there is no other file.
///
/// # Errors
/// When it is not a static x86-64 ELF program.
pub fn read_agent(path: &Path) -> Result<Vec<u8>> {
    let size = fs::metadata(path)
        .with_context(|| {
            format!("there is no guest agent at {}; give one with --guest-binary", path.display())
        })?
        .len();
    if size > AGENT_BYTES_MAX {
        bail!("{} is larger than any guest agent", path.display());
    }
    let bytes = fs::read(path).with_context(|| format!("could not read {}", path.display()))?;
    match interpreter_of(&bytes) {
        None => bail!("{} is not an x86-64 ELF program", path.display()),
        Some(true) => bail!(
            "{} is dynamically linked; in the initramfs there is no other file, so link it \
             statically",
            path.display()
        ),
        Some(false) => Ok(bytes),
    }
}

/// Whether an x86-64 ELF program asks for a loader (PT_INTERP); `None` when it is not one.
fn interpreter_of(elf: &[u8]) -> Option<bool> {
    const MACHINE_X86_64: u64 = 62;
    const PT_INTERP: u64 = 3;
    let number = |at: usize, bytes: usize| -> Option<u64> {
        let field = elf.get(at..at.checked_add(bytes)?)?;
        Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    if !elf.starts_with(b"\x7fELF\x02\x01") || number(18, 2)? != MACHINE_X86_64 {
        return None;
    }
    let table = usize::try_from(number(32, 8)?).ok()?;
    let (size, count) = (usize::try_from(number(54, 2)?).ok()?, number(56, 2)?);
    for index in 0..usize::try_from(count).ok()? {
        let entry = table.checked_add(index.checked_mul(size)?)?;
        if number(entry, 4)? == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_static_programs_are_packed() {
        // A shell on Debian is dynamically linked.
        let shell = fs::read("/bin/sh").unwrap();
        assert_eq!(interpreter_of(&shell), Some(true));
        assert_eq!(interpreter_of(b"#!/bin/sh\n"), None);
        assert_eq!(interpreter_of(&shell[..40]), None, "cut off in its header");
        let mut none = shell;
        none[56] = 0;
        none[57] = 0;
        assert_eq!(interpreter_of(&none), Some(false), "no program headers at all");
    }
}
