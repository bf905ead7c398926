//! `mica-lab up`: from nothing, or from whatever is there, to a host whose daemon answers.
//!
//! Safe to run again: a running lab is kept, gets the programs that changed, and its daemon is
//! restarted only then. Each phase says how long it took. A failed start leaves no process.

use super::drives::{self, Programs};
use super::image::{self, Image};
use super::options::Shape;
use super::progress::say;
use super::state::{self, Home, Lab};
use super::{apt, daemon, qemu};
use anyhow::{Context as _, Result, bail, ensure};
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A start takes about ten seconds on two cores; a busy machine may need several times that.
const BOOT_MAX: Duration = Duration::from_secs(180);
const PROBE_MAX: Duration = Duration::from_secs(1);
const PROBE_PAUSE: Duration = Duration::from_millis(100);
const CONSOLE_LINES_SHOWN: usize = 30;

/// What the command line asked for.
#[derive(Debug, Clone)]
pub struct Request {
    pub shape: Shape,
    pub api_port: u16,
    pub binaries: PathBuf,
    pub daemon: bool,
}

pub fn up(home: &Home, request: &Request) -> Result<()> {
    request.shape.check()?;
    let programs = Programs::find(&request.binaries)?;
    if request.daemon {
        for name in ["mica", "mica-vm", "mica-guest"] {
            ensure!(
                programs.0.contains_key(name),
                "there is no {name} in {}: build it, give --binaries DIR, or start the host alone \
                 with --no-daemon",
                request.binaries.display()
            );
        }
    }
    let _lock = home.lock()?;
    if home.qemu()?.is_some()
        && let Some(lab) = home.load()?
    {
        return refresh(home, lab, request, &programs);
    }
    home.kill_qemu()?;
    home.forget_start()?;
    apt::check_programs()?;
    let image = image::ensure()?;
    let lab = prepare(home, request, &programs, &image)?;
    let booted = boot(home, &lab, &image);
    if booted.is_err() {
        home.kill_qemu()?;
        home.forget_start()?;
    }
    booted?;
    home.save(&lab)?;
    finish(home, &lab)
}

/// Restarts the daemon of a lab that runs, with more options of `mica serve`.
pub fn restart(home: &Home, options: &[String]) -> Result<()> {
    let _lock = home.lock()?;
    let lab = home.running()?;
    ensure!(lab.daemon, "the lab was started without a daemon; `mica lab up` starts one");
    daemon::start(&lab.channel(), lab.api_port, options)?;
    say("daemon restarted");
    Ok(())
}

/// The lab runs: bring its programs up to date.
fn refresh(home: &Home, mut lab: Lab, request: &Request, programs: &Programs) -> Result<()> {
    if lab.shape != request.shape || lab.api_port != request.api_port {
        say("the lab is up with other options than asked; `mica lab down` first to change them");
    }
    let channel = lab.channel();
    ensure!(
        channel.answers(Duration::from_secs(10)),
        "the lab's QEMU runs but its host does not answer; `mica lab down`, then `mica lab up`"
    );
    let changed = programs.changed_since(&lab.programs);
    if changed.is_empty() {
        say("the lab is up");
    } else {
        say(&format!("the lab is up; replacing {}", changed.join(", ")));
        daemon::push_programs(&channel, programs, &changed)?;
        lab.programs = programs.digests();
    }
    let restart = request.daemon && (!changed.is_empty() || !daemon::healthy(lab.api_port));
    lab.daemon |= request.daemon;
    home.save(&lab)?;
    if restart { finish(home, &lab) } else { Ok(()) }
}

/// Decides the ports and secrets of this start and makes its drives.
fn prepare(home: &Home, request: &Request, programs: &Programs, image: &Image) -> Result<Lab> {
    free_port(request.api_port).with_context(|| {
        format!("port {} of 127.0.0.1 is taken; choose another by --port", request.api_port)
    })?;
    let lab = Lab {
        shape: request.shape,
        image: image.directory.clone(),
        kernel_release: image.kernel_release.clone(),
        api_port: request.api_port,
        channel_port: free_port(0).context("find a free port of 127.0.0.1")?,
        token: state::random_hex(16)?,
        started_unix_s: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .context("the clock is before 1970")?
            .as_secs(),
        programs: programs.digests(),
        daemon: request.daemon,
    };
    let key = api_key(home)?;
    drives::make_root_overlay(home, image)?;
    drives::make_tools(home, programs, &lab.token, &key)?;
    drives::make_store(home, request.shape.drive_gib)?;
    say("drives made");
    Ok(lab)
}

/// The key stays the same for the life of the store, so clients keep working after a restart.
fn api_key(home: &Home) -> Result<String> {
    match fs::read_to_string(home.key_file()) {
        Ok(key) => Ok(key.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = format!("e2b_{}", state::random_hex(20)?);
            state::write_private(&home.key_file(), format!("{key}\n").as_bytes())?;
            Ok(key)
        }
        Err(error) => Err(error).context("read the API key"),
    }
}

/// Binds and lets go. `0` finds any free port.
fn free_port(port: u16) -> io::Result<u16> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))?.local_addr().map(|address| address.port())
}

/// Starts QEMU and waits for the exec channel.
fn boot(home: &Home, lab: &Lab, image: &Image) -> Result<()> {
    qemu::start(home, lab, image)?;
    say(&format!("QEMU started; kernel {} boots", lab.kernel_release));
    let started = Instant::now();
    let mut told = Instant::now();
    loop {
        if lab.channel().answers(PROBE_MAX) {
            say(&format!("host up ({:.1} s after power on)", started.elapsed().as_secs_f64()));
            return Ok(());
        }
        if home.qemu()?.is_none() {
            bail!("QEMU ended while the host booted; its console said:\n{}", console_tail(home));
        }
        if started.elapsed() > BOOT_MAX {
            bail!(
                "the host did not come up in {BOOT_MAX:?}; its console said:\n{}",
                console_tail(home)
            );
        }
        if told.elapsed() > Duration::from_secs(5) {
            told = Instant::now();
            let tail = console_tail(home);
            say(&format!("still booting … {}", tail.lines().last().unwrap_or("")));
        }
        thread::sleep(PROBE_PAUSE);
    }
}

fn console_tail(home: &Home) -> String {
    match fs::read(home.console_log()) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(CONSOLE_LINES_SHOWN)..].join("\n")
        }
        Err(error) => format!("(the console log cannot be read: {error})"),
    }
}

/// Starts the daemon and says what can be done now.
fn finish(home: &Home, lab: &Lab) -> Result<()> {
    let flag =
        if home.name == "default" { String::new() } else { format!(" --name {}", home.name) };
    if !lab.daemon {
        say(&format!("the host is up without the daemon; try: mica lab exec{flag} -- uname -a"));
        return Ok(());
    }
    let started = Instant::now();
    daemon::start(&lab.channel(), lab.api_port, &[])?;
    say(&format!("daemon up ({:.1} s)", started.elapsed().as_secs_f64()));
    say(&format!("the API is at {}; for clients: eval \"$(mica lab env{flag})\"", lab.api_url()));
    Ok(())
}
