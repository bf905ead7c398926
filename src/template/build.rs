//! Builds a template: checks, stages, commit.
//!
//! Called by `mica template build`. Refuses to start without the tools it needs, and to leave
//! anything behind when a step fails: stages and the store commit at their end or not at all.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use mica_storage::{Part, ReadyWhen, Store, TemplateSpec};
use mica_units::{Mebibytes, TemplateName, VcpuCount};

use super::apt_memo::{self, Answers};
use super::boot;
use super::cache::{Cache, Key};
use super::debian::{KernelPackage, Mirrors};
use super::image;
use super::preset::{BASE_PACKAGES, Contents, Kernel, Preset};
use super::rootfs;
use super::runner::Runner;

/// The kernel command line of a template, unless another is given. The second line leaves out what
/// only costs time at boot: probing for PCI and for serial ports that are not there, and the self-tests
/// of the cryptographic algorithms.
pub const CMDLINE: &str = concat!(
    "console=ttyS0 reboot=k panic=-1 quiet tsc=reliable no_timer_check random.trust_cpu=on",
    " pci=off 8250.nr_uarts=1 cryptomgr.notests"
);
/// Memory a guest of ours can have: less does not boot a stock kernel with its initramfs.
const MEMORY_MIB: std::ops::RangeInclusive<u32> = 128..=262_144;
const DISK_MIB: std::ops::RangeInclusive<u32> = 256..=1_048_576;
/// What a build runs, and the Debian package it is in.
const TOOLS: [(&str, &str); 9] = [
    ("debootstrap", "debootstrap"),
    ("mkfs.ext4", "e2fsprogs"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("chroot", "coreutils"),
    ("xz", "xz-utils"),
    ("dpkg-deb", "dpkg"),
    ("apt-get", "apt"),
    ("mount", "mount"),
];

/// What to build.
#[derive(Clone, Debug)]
pub struct BuildRequest {
    /// The template's name.
    pub name: TemplateName,
    /// What it contains.
    pub contents: Contents,
    /// The image of containers that it is built on, in place of debootstrap's Debian.
    pub image: Option<PathBuf>,
    /// vCPUs of a sandbox.
    pub vcpus: VcpuCount,
    /// Memory of a sandbox.
    pub memory: Mebibytes,
    /// Size of its root disk.
    pub disk_mib: u32,
    /// The kernel command line.
    pub cmdline: String,
    /// The agent to boot.
    pub agent: PathBuf,
    /// Build every stage again.
    pub force: bool,
}

/// The keys of all stages, and what they were made from.
#[derive(Debug)]
struct Plan {
    mirrors: Mirrors,
    package: KernelPackage,
    base: Key,
    rootfs: Key,
    disk: Key,
    kernel: Key,
    initramfs: Key,
    all: Key,
}

/// Checks a size in MiB.
///
/// # Errors
/// When it is out of range.
pub fn check_sizes(memory_mib: u32, disk_mib: u32) -> Result<()> {
    for (option, value, range) in
        [("--memory", memory_mib, MEMORY_MIB), ("--disk-mib", disk_mib, DISK_MIB)]
    {
        if !range.contains(&value) {
            bail!(
                "{option} {value} is out of range; give {} to {} MiB",
                range.start(),
                range.end()
            );
        }
    }
    Ok(())
}

/// Builds the template and commits it to the store.
///
/// # Errors
/// When a check or a step fails; the message names the step.
pub fn build(store_dir: &Path, cache_dir: &Path, request: &BuildRequest) -> Result<()> {
    let runner = Runner::new()?;
    check_machine()?;
    let store = Store::open(store_dir)?;
    let plan = plan(&runner, cache_dir, request).context("step `plan` failed")?;
    let existing = store.find_template(request.name.as_str());
    if let Ok(Some(template)) = &existing
        && template.manifest().inputs_hash == plan.all.as_str()
        && !request.force
    {
        return runner.say("plan", &format!("template `{}` is up to date", request.name));
    }
    if let Err(error) = existing {
        runner.say("plan", &format!("replacing a damaged template: {error}"))?;
    }
    let cache = Cache::open(cache_dir, request.force, &runner)?;
    let kernel = boot::kernel(&runner, &cache, &plan.kernel, &plan.package)?;
    let initramfs = boot::initramfs(&runner, &cache, &plan.initramfs, &kernel, &request.agent)?;
    let base = match &request.image {
        Some(image) => rootfs::image(&runner, &cache, &plan.base, image)?,
        None => rootfs::base(&runner, &cache, &plan.base, &plan.mirrors, &BASE_PACKAGES)?,
    };
    let root = rootfs::layer(&runner, &cache, &plan.rootfs, &base, &request.contents)?;
    let disk = image::disk(&runner, &cache, &plan.disk, &root, request.disk_mib)?;
    let files = [
        (Part::Kernel, kernel.join("vmlinuz")),
        (Part::Initramfs, initramfs.join("initramfs")),
        (Part::Disk, disk.join("disk")),
    ];
    let spec = TemplateSpec {
        name: request.name.clone(),
        vcpus: request.vcpus,
        memory: request.memory,
        cmdline: request.cmdline.clone(),
        envd_version: mica_wire::guest::ENVD_VERSION.to_owned(),
        ready: ReadyWhen::Agent,
        inputs_hash: plan.all.as_str().to_owned(),
    };
    commit(&runner, &store, &spec, &files).context("step `commit` failed")?;
    cache.prune().context("the template is ready; the build cache could not be cleaned up")
}

fn commit(
    runner: &Runner,
    store: &Store,
    spec: &TemplateSpec,
    files: &[(Part, PathBuf)],
) -> Result<()> {
    runner.say("commit", "copying into the store")?;
    let staging = store.stage(&spec.name, true)?;
    for (part, path) in files {
        runner.check()?;
        staging.copy_part(*part, path)?;
    }
    runner.check()?;
    let template = staging.commit(spec)?;
    let id = &template.manifest().id;
    runner.say("commit", &format!("template `{}` is ready, id {id}", spec.name))
}

fn plan(runner: &Runner, cache_dir: &Path, request: &BuildRequest) -> Result<Plan> {
    boot::read_agent(&request.agent)?;
    let Answers { mirrors, package } = apt_memo::ask(runner, cache_dir)?;
    let base = match &request.image {
        Some(image) => rootfs::image_key(&Key::of_file(image)?),
        None => rootfs::base_key(&mirrors, &BASE_PACKAGES),
    };
    let rootfs = rootfs::layer_key(&base, &request.contents);
    let disk = image::key(&rootfs, request.disk_mib);
    let kernel = boot::kernel_key(&package);
    let initramfs = boot::initramfs_key(&kernel, &Key::of_file(&request.agent)?);
    let all = Key::of(&[
        ("disk", disk.as_str()),
        ("kernel", kernel.as_str()),
        ("initramfs", initramfs.as_str()),
        ("vcpus", &request.vcpus.to_string()),
        ("memory", &request.memory.count().to_string()),
        ("cmdline", &request.cmdline),
        ("envd", mica_wire::guest::ENVD_VERSION),
    ]);
    Ok(Plan { mirrors, package, base, rootfs, disk, kernel, initramfs, all })
}

/// Fails early, and with all that is missing at once.
fn check_machine() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a template build must run as root: it mounts, and makes files of other users");
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let missing: Vec<_> = TOOLS
        .iter()
        .filter(|(tool, _)| !std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()))
        .map(|(tool, package)| format!("`{tool}` (package {package})"))
        .collect();
    if !missing.is_empty() {
        bail!("these programs are missing: {}; install them with apt-get", missing.join(", "));
    }
    Ok(())
}

/// Splits a comma-separated option.
pub fn split_list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

/// The contents a request on the command line means.
///
/// # Errors
/// When a name is not one.
pub fn contents(
    name: &TemplateName,
    preset: Option<Preset>,
    packages: &str,
    pip: &str,
    kernels: &[Kernel],
) -> Result<Contents> {
    let preset = preset.unwrap_or_else(|| Preset::for_name(name.as_str()));
    preset.contents(&split_list(packages), &split_list(pip), kernels)
}
