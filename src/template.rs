//! `mica template`: build, list, delete, export, import.
//!
//! Called by the command line. Refuses a name that is not in form before anything else happens.
//! Works beside a running daemon: both use the same store, whose commits are atomic.

mod apt_memo;
mod boot;
mod build;
mod cache;
mod cpio;
mod debian;
mod image;
mod layers;
mod list;
mod oci;
mod preset;
mod rootfs;
mod runner;
mod warm;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand, ValueEnum};
use mica_storage::{Imported, OnExisting, Part, ReadyWhen, Store, TemplateSpec, write_archive};
use mica_units::{Mebibytes, TemplateName, VcpuCount};

use preset::{Kernel, Preset};
use warm::WarmArgs;

/// Where templates are built from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Source {
    /// Debian packages, through debootstrap.
    Debootstrap,
}

/// When a sandbox counts as started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Ready {
    /// When the agent in the guest answers.
    Agent,
    /// At the first byte on the serial console.
    Console,
}

/// Makes, lists and moves templates.
#[derive(Args, Debug)]
pub struct TemplateArgs {
    /// The directory of templates and sandbox disks.
    #[arg(long, global = true, value_name = "DIR", default_value = "/var/lib/mica")]
    store: PathBuf,
    /// Do not start the guest after a build, an import or an add: the template cannot be used before
    /// `mica template warm`.
    #[arg(long, global = true)]
    cold: bool,
    #[command(subcommand)]
    command: TemplateCommand,
}

#[derive(Subcommand, Debug)]
enum TemplateCommand {
    /// Build a template from Debian packages.
    Build(BuildArgs),
    /// Boot a template once, wait until its services are up, and keep that state: sandboxes start from
    /// it.
    Warm {
        /// Its name.
        name: TemplateName,
        #[command(flatten)]
        how: WarmArgs,
    },
    /// List the templates.
    List {
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Delete a template. Sandboxes that run from it go on.
    Delete {
        /// Its name.
        name: TemplateName,
    },
    /// Write a template as a tar archive to standard output, or to a file.
    Export {
        /// Its name or id.
        name: String,
        /// The file to write.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Read a template that `export` wrote: a file, a block device, or `-`.
    Import {
        /// What to read.
        archive: PathBuf,
        /// Replace a template of the same name.
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        how: WarmArgs,
    },
    /// Make a template from a kernel and a disk of your own.
    #[command(hide = true)]
    Add(AddArgs),
}

#[derive(Args, Debug)]
struct SizeArgs {
    /// vCPUs of a sandbox, 1 to 8.
    #[arg(long, default_value_t = 2)]
    vcpus: u32,
    /// Memory of a sandbox, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    memory: u32,
    /// The kernel command line.
    #[arg(long, value_name = "TEXT", default_value = build::CMDLINE)]
    cmdline: String,
}

#[derive(Args, Debug)]
struct BuildArgs {
    /// Its name. `base` and `code-interpreter-v1` are presets.
    #[arg(long)]
    name: TemplateName,
    /// What it is built from.
    #[arg(long, value_enum, default_value = "debootstrap")]
    from: Source,
    /// An image of containers, based on Debian, in a file: what `docker save` or `skopeo copy docker://…
    /// oci-archive:FILE` wrote. It is built on that in place of debootstrap's Debian.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["preset", "kernels"])]
    image: Option<PathBuf>,
    /// What it contains; by default the preset of its name, or else `base`.
    #[arg(long, value_enum)]
    preset: Option<Preset>,
    /// More Debian packages, separated by commas.
    #[arg(long, value_name = "A,B", default_value = "")]
    packages: String,
    /// More PyPI packages, separated by commas.
    #[arg(long, value_name = "X,Y", default_value = "")]
    pip: String,
    /// One more language of the code interpreter; may be given several times.
    #[arg(long = "kernel", value_enum, value_name = "LANGUAGE")]
    kernels: Vec<Kernel>,
    #[command(flatten)]
    size: SizeArgs,
    /// Size of the root disk, in MiB. It is sparse: unused space takes none on the host.
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    disk_mib: u32,
    /// The guest agent; by default `mica-guest` beside this program.
    #[arg(long, value_name = "FILE")]
    guest_binary: Option<PathBuf>,
    /// Build every stage again, also when nothing has changed.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    how: WarmArgs,
}

#[derive(Args, Debug)]
struct AddArgs {
    /// Its name.
    #[arg(long)]
    name: TemplateName,
    /// A bzImage or an ELF vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,
    /// An initial RAM file system.
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// A root disk.
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// When a sandbox counts as started.
    #[arg(long, value_enum)]
    ready: Ready,
    #[command(flatten)]
    size: SizeArgs,
    /// Replace a template of the same name.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    how: WarmArgs,
}

/// Runs one `mica template` command.
///
/// # Errors
/// When it could not be done; the message says what to change.
pub fn run(args: &TemplateArgs) -> Result<()> {
    let store = || Store::open(&args.store);
    match &args.command {
        TemplateCommand::Build(build) => {
            run_build(&args.store, build)?;
            warm_up(args, build.name.as_str(), &build.how)
        }
        TemplateCommand::Add(add) => {
            run_add(&store()?, add)?;
            warm_up(args, add.name.as_str(), &add.how)
        }
        TemplateCommand::Warm { name, how } => warm::run(&args.store, name.as_str(), how),
        TemplateCommand::List { json } => {
            let templates = store()?.templates()?;
            let text = if *json { list::json(&templates)? } else { list::table(&templates) };
            io::stdout().write_all(text.as_bytes()).context("could not print the list")
        }
        TemplateCommand::Delete { name } => {
            if !store()?.delete_template(name)? {
                bail!("there is no template `{name}`; `mica template list` shows those there are");
            }
            println!("deleted `{name}`");
            Ok(())
        }
        TemplateCommand::Export { name, output } => run_export(&store()?, name, output.as_deref()),
        TemplateCommand::Import { archive, force, how } => {
            let name = run_import(&store()?, archive, *force)?;
            warm_up(args, name.as_str(), how)
        }
    }
}

/// Makes the running snapshot of a template that is new, or has none.
fn warm_up(args: &TemplateArgs, name: &str, how: &WarmArgs) -> Result<()> {
    if Store::open(&args.store)?.find_snapshot(name)?.is_some() {
        return Ok(());
    }
    if args.cold {
        return Ok(());
    }
    if !warm::is_possible(how)? {
        println!("template `{name}` is cold: KVM here cannot start it. On its host run:");
        println!("  mica template warm {name}");
        return Ok(());
    }
    warm::run(&args.store, name, how)
}

fn run_build(store: &Path, args: &BuildArgs) -> Result<()> {
    let Source::Debootstrap = args.from;
    build::check_sizes(args.size.memory, args.disk_mib)?;
    let agent = match &args.guest_binary {
        Some(path) => path.clone(),
        None => std::env::current_exe()
            .context("could not find this program's own directory")?
            .with_file_name("mica-guest"),
    };
    let cache = std::env::var_os("MICA_CACHE_DIR")
        .map_or_else(|| PathBuf::from("/var/cache/mica"), PathBuf::from)
        .join("templates");
    let request = build::BuildRequest {
        name: args.name.clone(),
        image: args.image.clone(),
        contents: build::contents(
            &args.name,
            args.image.as_ref().map(|_| Preset::Base).or(args.preset),
            &args.packages,
            &args.pip,
            &args.kernels,
        )?,
        vcpus: VcpuCount::new(args.size.vcpus)?,
        memory: Mebibytes::new(args.size.memory),
        disk_mib: args.disk_mib,
        cmdline: args.size.cmdline.clone(),
        agent,
        force: args.force,
    };
    build::build(store, &cache, &request)
        .with_context(|| format!("template `{}` was not built", args.name))
}

fn run_add(store: &Store, args: &AddArgs) -> Result<()> {
    let (ready, envd_version) = match args.ready {
        Ready::Agent => (ReadyWhen::Agent, mica_wire::guest::ENVD_VERSION),
        Ready::Console => (ReadyWhen::Console, ""),
    };
    let spec = TemplateSpec {
        name: args.name.clone(),
        vcpus: VcpuCount::new(args.size.vcpus)?,
        memory: Mebibytes::new(args.size.memory),
        cmdline: args.size.cmdline.clone(),
        envd_version: envd_version.to_owned(),
        ready,
        inputs_hash: String::new(),
    };
    let staging = store.stage(&args.name, args.force)?;
    staging.copy_part(Part::Kernel, &args.kernel)?;
    for (part, path) in [(Part::Initramfs, &args.initramfs), (Part::Disk, &args.disk)] {
        if let Some(path) = path {
            staging.copy_part(part, path)?;
        }
    }
    let template = staging.commit(&spec)?;
    println!("template `{}` is ready, id {}", args.name, template.manifest().id);
    Ok(())
}

fn run_export(store: &Store, name: &str, output: Option<&Path>) -> Result<()> {
    let Some(template) = store.find_template(name)? else {
        bail!("there is no template `{name}`; `mica template list` shows those there are");
    };
    let Some(path) = output else {
        let out = io::stdout();
        if out.is_terminal() {
            bail!("an archive is not for a terminal; redirect it to a file, or give --output FILE");
        }
        return Ok(write_archive(&template, BufWriter::new(out.lock()))?);
    };
    let file = File::create(path).with_context(|| format!("could not make {}", path.display()))?;
    write_archive(&template, BufWriter::new(&file))?;
    file.sync_all().with_context(|| format!("could not sync {}", path.display()))
}

fn run_import(store: &Store, archive: &Path, force: bool) -> Result<TemplateName> {
    let input: Box<dyn io::Read> = if archive == Path::new("-") {
        Box::new(io::stdin().lock())
    } else {
        let file =
            File::open(archive).with_context(|| format!("could not open {}", archive.display()))?;
        Box::new(BufReader::with_capacity(1 << 20, file))
    };
    let on_existing = if force { OnExisting::Replace } else { OnExisting::Keep };
    let (template, state) = match store.import(input, on_existing)? {
        Imported::Stored(template) => (template, "ready"),
        Imported::UpToDate(template) => (template, "up to date"),
    };
    let manifest = template.manifest();
    println!("template `{}` is {state}, id {}", manifest.name, manifest.id);
    Ok(manifest.name.clone())
}
