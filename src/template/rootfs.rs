//! Builds root file systems: debootstrap or an image of containers, packages, users, Python.
//!
//! Called by the build. Refuses to touch the machine: every recipe runs in a mount and a PID
//! namespace of its own, whose mounts and processes end with it.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cache::{Cache, Key};
use super::debian::{Mirrors, SUITE, proxy_config};
use super::layers::Root;
use super::oci::Image;
use super::preset::Contents;
use super::runner::{Runner, bound_to_us};

const ENTER: &str = include_str!("recipe/enter.sh");
const BASE: &str = include_str!("recipe/base.sh");
const ADOPT: &str = include_str!("recipe/adopt.sh");
const PACKAGES: &str = include_str!("recipe/packages.sh");
const PIP: &str = include_str!("recipe/pip.sh");
const INTERPRETER: &str = include_str!("recipe/interpreter.sh");
const FINISH: &str = include_str!("recipe/finish.sh");
/// Raised when this file changes what a root file system looks like; the recipes count anyway.
const VERSION: &str = "2";
/// Where a recipe mounts what it needs; an image may lack them.
const MOUNTED_ON: [&str; 6] = ["proc", "run", "tmp", "dev", "etc", "sys"];
/// Read by login shells, which commands run in.
const PROFILE: &str = "etc/profile.d/00-image-path.sh";
/// Beside the root of an image.
const ENV_FILE: &str = "env.json";
/// The machine's certificates, with those of its own proxies.
const CA_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const CHROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Variables of the machine that a recipe sees, besides those that begin with `PIP_`.
const PASSED_ON: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "ftp_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "NO_PROXY",
];

/// The key of the minimal system that every template shares.
pub fn base_key(mirrors: &Mirrors, packages: &[&str]) -> Key {
    Key::of(&[
        ("version", VERSION),
        ("suite", SUITE),
        ("sources", &mirrors.sources_list()),
        ("packages", &packages.join(" ")),
        ("recipes", &[ENTER, BASE, FINISH].concat()),
    ])
}

/// The key of what an image of containers becomes. `archive` is that of its file.
pub fn image_key(archive: &Key) -> Key {
    Key::of(&[
        ("version", VERSION),
        ("archive", archive.as_str()),
        ("recipes", &[ENTER, ADOPT, FINISH].concat()),
    ])
}

/// The key of a template's own root file system.
pub fn layer_key(base: &Key, contents: &Contents) -> Key {
    Key::of(&[
        ("base", base.as_str()),
        ("packages", &contents.packages.join(" ")),
        ("pip", &contents.pip.join(" ")),
        ("template.json", &contents.template_json(&BTreeMap::new())),
        ("recipes", &[ENTER, PACKAGES, PIP, INTERPRETER, FINISH].concat()),
    ])
}

/// What a template's own root file system is built on.
#[derive(Debug)]
pub struct Base {
    root: PathBuf,
    /// What commands find in their environment: nothing but an image has any.
    env: BTreeMap<String, String>,
}

/// Makes, or takes from the cache, a root file system of an image of containers.
///
/// # Errors
/// When a step fails; the message names it.
pub fn image(runner: &Runner, cache: &Cache, key: &Key, archive: &Path) -> Result<Base> {
    let stage = cache.stage(runner, "image", key, |out| {
        let root = out.join("root");
        fs::create_dir(&root)
            .and_then(|()| fs::set_permissions(&root, fs::Permissions::from_mode(0o755)))
            .with_context(|| format!("could not make {}", root.display()))?;
        let image = Image::open(runner, cache, archive)?;
        let mut applied = Root::open(&root)?;
        for (number, layer) in (1..).zip(image.layers()) {
            runner.say("image", &format!("layer {number} of {}", image.count()))?;
            applied
                .apply(runner, layer?)
                .with_context(|| format!("could not apply layer {number}"))?;
        }
        MOUNTED_ON.iter().try_for_each(|dir| applied.own_directory(dir))?;
        // Before anything is mounted on those files: as links they would lead to the machine's.
        neutral_network_files(&root)?;
        recipe::<&str>(runner, cache, "image adoption", &root, ADOPT, &[])?;
        recipe::<&str>(runner, cache, "image clean-up", &root, FINISH, &[])?;
        neutral_network_files(&root)?;
        if let Some(path) = image.env.get("PATH") {
            // A login shell sets it anew, before it reads this.
            let line = format!("export PATH='{}'\n", path.replace('\'', r"'\''"));
            Root::open(&root)?.write(Path::new(PROFILE), &line)?;
        }
        let env = serde_json::to_vec(&image.env).context("could not write its environment")?;
        fs::write(out.join(ENV_FILE), env).context("could not write its environment")
    })?;
    let env = fs::read(stage.join(ENV_FILE)).context("could not read the image's environment")?;
    let env = serde_json::from_slice(&env).context("could not read the image's environment")?;
    Ok(Base { root: stage.join("root"), env })
}

/// Builds, or takes from the cache, the minimal system; its directory is `root` in the stage.
///
/// # Errors
/// When a step fails; the message names it.
pub fn base(
    runner: &Runner,
    cache: &Cache,
    key: &Key,
    mirrors: &Mirrors,
    packages: &[&str],
) -> Result<Base> {
    let stage = cache.stage(runner, "base", key, |out| {
        let root = out.join("root");
        debootstrap(runner, &root, mirrors)?;
        let sources = root.join("etc/apt/sources.list");
        fs::write(&sources, mirrors.sources_list())
            .with_context(|| format!("could not write {}", sources.display()))?;
        recipe(runner, cache, "base packages", &root, BASE, packages)?;
        recipe::<&str>(runner, cache, "base clean-up", &root, FINISH, &[])?;
        neutral_network_files(&root)
    })?;
    Ok(Base { root: stage.join("root"), env: BTreeMap::new() })
}

/// Builds, or takes from the cache, a template's own root file system on top of `base`.
///
/// # Errors
/// When a step fails; the message names it.
pub fn layer(
    runner: &Runner,
    cache: &Cache,
    key: &Key,
    base: &Base,
    contents: &Contents,
) -> Result<PathBuf> {
    let stage = cache.stage(runner, "rootfs", key, |out| {
        let root = out.join("root");
        let mut copy = bound_to_us("cp");
        copy.args(["--archive", "--reflink=auto"]).arg(&base.root).arg(&root);
        runner.run("rootfs copy", copy)?;
        if !contents.packages.is_empty() {
            recipe(runner, cache, "rootfs packages", &root, PACKAGES, &contents.packages)?;
        }
        if !contents.pip.is_empty() {
            recipe(runner, cache, "rootfs pip", &root, PIP, &contents.pip)?;
        }
        if contents.interpreter {
            let kernels: Vec<&str> = contents.kernels.iter().map(|kernel| kernel.name()).collect();
            recipe(runner, cache, "rootfs interpreter", &root, INTERPRETER, &kernels)?;
        }
        let settings = contents.template_json(&base.env);
        Root::open(&root)?.write(Path::new("etc/mica/template.json"), &settings)?;
        recipe::<&str>(runner, cache, "rootfs clean-up", &root, FINISH, &[])?;
        neutral_network_files(&root)
    })?;
    Ok(stage.join("root"))
}

fn debootstrap(runner: &Runner, root: &Path, mirrors: &Mirrors) -> Result<()> {
    let mut command = contained();
    command.args(["debootstrap", "--variant=minbase", SUITE]).arg(root).arg(mirrors.main());
    for line in proxy_config(runner)?.lines() {
        // apt's proxy is for debootstrap too, which reads only the environment.
        let value = line.split('"').nth(1).unwrap_or_default();
        if line.to_ascii_lowercase().starts_with("acquire::http::proxy ") && !value.is_empty() {
            command.env("http_proxy", value);
        }
    }
    runner.run("base debootstrap", command).context("debootstrap failed")
}

/// Runs one recipe inside `root`.
fn recipe<S: AsRef<OsStr>>(
    runner: &Runner,
    cache: &Cache,
    step: &'static str,
    root: &Path,
    script: &str,
    arguments: &[S],
) -> Result<()> {
    let work = cache.work_dir()?;
    let (enter, inside) = (work.path().join("enter.sh"), work.path().join("recipe.sh"));
    for (path, text) in [(&enter, ENTER), (&inside, script)] {
        fs::write(path, text).with_context(|| format!("could not write {}", path.display()))?;
    }
    let mut command = contained();
    command.arg("/bin/sh").arg(&enter).arg(root).arg(&inside).args(arguments);
    let kept: Vec<_> = std::env::vars_os()
        .filter(|(name, _)| {
            let name = name.to_string_lossy();
            name.starts_with("PIP_") || PASSED_ON.contains(&name.as_ref())
        })
        .collect();
    command.env_clear().envs(kept).env("PATH", CHROOT_PATH).env("HOME", "/root");
    command.env("LANG", "C.UTF-8").env("DEBIAN_FRONTEND", "noninteractive");
    if Path::new(CA_BUNDLE).exists() {
        command.env("MICA_BUILD_CA", CA_BUNDLE);
    }
    command.env("MICA_BUILD_APT_CONF", proxy_config(runner)?);
    runner.run(step, command).with_context(|| format!("step `{step}` failed"))
}

/// A command in mount and PID namespaces of its own: what it mounts and starts ends with it.
fn contained() -> Command {
    let mut command = bound_to_us("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--"]);
    command
}

/// debootstrap copies the machine's name and name servers; a sandbox has neither.
fn neutral_network_files(root: &Path) -> Result<()> {
    let files = [
        ("etc/hostname", "mica\n"),
        ("etc/hosts", "127.0.0.1 localhost mica\n::1 localhost\n"),
        ("etc/resolv.conf", ""),
    ];
    let root = Root::open(root)?;
    files.iter().try_for_each(|(name, text)| root.write(Path::new(name), text))
}
