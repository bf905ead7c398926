//! The steps of a build, carried out one by one in its sandbox.
//!
//! Called by [`super::run`]. What a step sets (environment, directory, user) holds for the steps after it,
//! and becomes the template's. Refuses a step that takes longer than [`STEP_TIME_MAX`]. An uploaded archive
//! is passed on as it is: the guest unpacks it.

use std::time::Duration;

use mica_shards::rt::time;
use mica_shards::{BuildStoreError, BuiltDefaults, Host, ShardError};
use mica_units::TenantId;

use super::background::Background;
use super::connect::ProcessEvent;
use super::guest::{Command, Guest, GuestError};
use super::log::{Level, Lines, Log};
use super::wish::Step;

/// How long one step may take.
const STEP_TIME_MAX: Duration = Duration::from_secs(3600);
/// How long a template's services may take until they are ready, and the time between two looks.
const READY_TIME_MAX: Duration = Duration::from_secs(600);
const READY_PAUSE: Duration = Duration::from_secs(2);
/// Without a command that tells, what was started gets so long.
const UNTOLD_READY_TIME: Duration = Duration::from_secs(20);
/// The user of a template that names none.
const USER: &str = "user";
/// Bytes of a template's environment: it travels to the agent in one line, beside that of a sandbox.
const ENV_BYTES_MAX: usize = 32 * 1024;
/// What is kept of what a command of our own says.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// The script that unpacks an archive.
pub(super) const COPY: &str = include_str!("copy.sh");
/// Makes a directory for a user, and says its whole name.
const WORKDIR: &str = r#"set -eu
if [ ! -d "$1" ]; then
  mkdir -p -- "$1"
  if id -u -- "$2" >/dev/null 2>&1; then chown -- "$2:" "$1"; fi
fi
cd -- "$1"
pwd"#;
/// Makes a user that is not there.
const ACCOUNT: &str =
    r#"id -u -- "$1" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash -- "$1""#;

/// Why a step failed, for whoever asked for the build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepError(pub String);

impl From<GuestError> for StepError {
    fn from(error: GuestError) -> Self {
        Self(error.to_string())
    }
}

impl From<ShardError> for StepError {
    fn from(error: ShardError) -> Self {
        Self(error.to_string())
    }
}

impl From<BuildStoreError> for StepError {
    fn from(error: BuildStoreError) -> Self {
        match error {
            BuildStoreError::TooMany(text) | BuildStoreError::NameTaken(text) => Self(text),
            BuildStoreError::Store(error) => {
                // The cause may hold paths of the host.
                tracing::error!(%error, "the store failed under a build");
                Self("the host's store failed; its log says why".to_owned())
            }
        }
    }
}

/// A build's sandbox, and what its steps have set so far.
#[derive(Debug)]
pub struct Site {
    /// The host, for uploads.
    pub host: Host,
    /// Whose build it is.
    pub tenant: TenantId,
    /// The agent.
    pub guest: Guest,
    /// Where lines go.
    pub log: Log,
    /// What the base said, and the steps after it.
    pub defaults: BuiltDefaults,
}

impl Site {
    /// Carries one step out.
    ///
    /// # Errors
    /// [`StepError`], after which the sandbox is of no use.
    pub async fn carry_out(&mut self, step: &Step) -> Result<(), StepError> {
        let limited = time::timeout(STEP_TIME_MAX, self.attempt(step)).await;
        limited.unwrap_or_else(|_| {
            let minutes = STEP_TIME_MAX.as_secs() / 60;
            Err(StepError(format!("the step did not end within {minutes} minutes")))
        })
    }

    async fn attempt(&mut self, step: &Step) -> Result<(), StepError> {
        match step {
            Step::Run { command, user } => {
                let shell = self.shell(command, user.clone());
                self.run(&shell).await
            }
            Step::Copy { hash, source, target, owner, mode } => {
                self.copy(hash, [source, target, owner, mode]).await
            }
            Step::Env(pairs) => self.set_env(pairs).await,
            Step::Workdir(path) => {
                let user = self.defaults.user.clone().unwrap_or_else(|| USER.to_owned());
                let whole = self.ask(&script(WORKDIR, &[path, &user]), true).await?;
                let whole = whole.lines().last().unwrap_or_default();
                if !whole.starts_with('/') {
                    return Err(StepError("the directory cannot be told".to_owned()));
                }
                self.defaults.workdir = Some(whole.to_owned());
                Ok(())
            }
            Step::User(user) => {
                self.ask(&script(ACCOUNT, &[user]), true).await?;
                self.defaults.user = Some(user.clone());
                Ok(())
            }
        }
    }

    /// A command line of the client's.
    fn shell(&self, line: &str, user: Option<String>) -> Command {
        Command {
            args: ["-l", "-c", line].map(str::to_owned).to_vec(),
            env: self.defaults.env.clone(),
            cwd: self.defaults.workdir.clone(),
            user: user.or_else(|| self.defaults.user.clone()),
        }
    }

    /// Runs a command whose output is the log's, until it ends well.
    async fn run(&mut self, command: &Command) -> Result<(), StepError> {
        let (code, status) = self.follow(command).await?;
        match code {
            0 => Ok(()),
            _ => Err(StepError(format!("command failed: {status}"))),
        }
    }

    /// Runs one of our own scripts, and gives what it wrote to standard output.
    async fn ask(&mut self, args: &[String], as_root: bool) -> Result<String, StepError> {
        let command = Command {
            args: args.to_vec(),
            env: self.defaults.env.clone(),
            cwd: self.defaults.workdir.clone(),
            user: if as_root { Some("root".to_owned()) } else { self.defaults.user.clone() },
        };
        let mut events = self.guest.start(&command).await?;
        let (mut said, mut complaint) = (Vec::new(), Vec::new());
        loop {
            match events.next().await? {
                ProcessEvent::Output { is_error, bytes } => {
                    let kept = if is_error { &mut complaint } else { &mut said };
                    let room = ANSWER_BYTES_MAX.saturating_sub(kept.len()).min(bytes.len());
                    kept.extend_from_slice(&bytes[..room]);
                }
                ProcessEvent::Ended { code: 0, .. } => break,
                ProcessEvent::Ended { status, .. } => {
                    let complaint = String::from_utf8_lossy(&complaint);
                    let last = complaint.trim().lines().last().unwrap_or_default().to_owned();
                    return Err(StepError(format!("{status}: {last}")));
                }
                ProcessEvent::Other => {}
            }
        }
        Ok(String::from_utf8_lossy(&said).into_owned())
    }

    /// Runs a command, its lines into the log, and says how it ended.
    async fn follow(&mut self, command: &Command) -> Result<(i32, String), StepError> {
        let mut events = self.guest.start(command).await?;
        let (mut out, mut err) = (Lines::default(), Lines::default());
        loop {
            match events.next().await? {
                ProcessEvent::Output { is_error: false, bytes } => {
                    out.push(&bytes, |line| self.log.line(Level::Info, line));
                }
                ProcessEvent::Output { is_error: true, bytes } => {
                    err.push(&bytes, |line| self.log.line(Level::Warn, line));
                }
                ProcessEvent::Ended { code, status } => {
                    out.end(|line| self.log.line(Level::Info, line));
                    err.end(|line| self.log.line(Level::Warn, line));
                    self.log.flush().await;
                    return Ok((code, status));
                }
                ProcessEvent::Other => {}
            }
            self.log.flush().await;
        }
    }

    async fn copy(&mut self, hash: &str, args: [&String; 4]) -> Result<(), StepError> {
        let (tenant, named) = (self.tenant.clone(), hash.to_owned());
        let opened = self.host.with_builds(move |builds| Ok(builds.open_upload(&tenant, &named)?));
        let Some((file, _)) = opened.await?? else {
            let text = "its files were not uploaded, or are gone again; build once more";
            return Err(StepError(text.to_owned()));
        };
        let archive = format!("/var/tmp/mica-copy-{hash}.tar");
        self.guest.upload(&archive, file).await?;
        let user = self.defaults.user.clone().unwrap_or_else(|| USER.to_owned());
        let [source, target, owner, mode] = args;
        let args = script(COPY, &[&archive, source, target, owner, mode, &user]);
        let command = Command {
            args,
            env: self.defaults.env.clone(),
            cwd: self.defaults.workdir.clone(),
            user: Some("root".to_owned()),
        };
        self.run(&command).await
    }

    /// Sets variables. `$NAME` and `${NAME}` in a value stand for what they are before this step.
    async fn set_env(&mut self, pairs: &[(String, String)]) -> Result<(), StepError> {
        let mut set = Vec::new();
        for (name, value) in pairs {
            let value = match value.contains('$') {
                true => self.ask(&script(&expansion(value), &[]), false).await?,
                false => value.clone(),
            };
            set.push((name.clone(), value));
        }
        self.defaults.env.extend(set);
        let bytes = serde_json::to_string(&self.defaults.env).map_or(usize::MAX, |text| text.len());
        if bytes > ENV_BYTES_MAX {
            let text =
                format!("the template's variables take {bytes} bytes, at most {ENV_BYTES_MAX} do");
            return Err(StepError(text));
        }
        Ok(())
    }

    /// Starts what is to run in every sandbox, and waits until it is ready.
    ///
    /// # Errors
    /// [`StepError`].
    pub async fn bring_up(
        &mut self,
        start: Option<&str>,
        ready: Option<&str>,
    ) -> Result<(), StepError> {
        let mut background = None;
        if let Some(start) = start {
            self.log.say(Level::Info, &format!("Starting: {start}")).await;
            let events = self.guest.start(&self.shell(start, None)).await?;
            background = Some(Background::watch(events));
        }
        let began = time::Instant::now();
        match ready {
            None if start.is_none() => return Ok(()),
            None => {
                while began.elapsed() < UNTOLD_READY_TIME && self.goes_on(background.as_ref())? {
                    time::sleep(READY_PAUSE).await;
                }
            }
            Some(ready) => {
                self.log.say(Level::Info, &format!("Waiting until ready: {ready}")).await;
                self.wait_until_ready(ready, background.as_ref(), began).await?;
            }
        }
        self.goes_on(background.as_ref())?;
        self.log.flush().await;
        Ok(())
    }

    async fn wait_until_ready(
        &mut self,
        ready: &str,
        background: Option<&Background>,
        began: time::Instant,
    ) -> Result<(), StepError> {
        let late = || {
            let minutes = READY_TIME_MAX.as_secs() / 60;
            StepError(format!("the ready command did not succeed within {minutes} minutes"))
        };
        let command = self.shell(ready, None);
        loop {
            let left = READY_TIME_MAX.saturating_sub(began.elapsed());
            let looked = time::timeout(left, self.follow(&command)).await;
            let (code, _) = looked.map_err(|_| late())??;
            if code == 0 {
                return Ok(());
            }
            self.goes_on(background)?;
            self.log.flush().await;
            if began.elapsed() + READY_PAUSE >= READY_TIME_MAX {
                return Err(late());
            }
            time::sleep(READY_PAUSE).await;
        }
    }

    /// Takes over what the started command wrote. Whether it still runs.
    fn goes_on(&mut self, background: Option<&Background>) -> Result<bool, StepError> {
        let Some(background) = background else { return Ok(false) };
        for (level, line) in background.take_lines() {
            self.log.line(level, &line);
        }
        match background.ended() {
            None => Ok(true),
            Some(Ok(())) => Ok(false),
            Some(Err(why)) => Err(StepError(format!("the start command failed: {why}"))),
        }
    }
}

/// Arguments of bash for a script of ours.
fn script(text: &str, args: &[&str]) -> Vec<String> {
    let head = ["-c", text, "mica-build"].into_iter();
    head.chain(args.iter().copied()).map(str::to_owned).collect()
}

/// A script that writes a value with its variables put in, and takes nothing else in it for its own.
fn expansion(value: &str) -> String {
    let mut quoted = String::new();
    let mut rest = value.chars().peekable();
    while let Some(c) = rest.next() {
        let names = |c: &char| c.is_ascii_alphabetic() || matches!(c, '_' | '{');
        match c {
            '$' if !rest.peek().is_some_and(names) => quoted.push_str("\\$"),
            '"' | '`' | '\\' => quoted.extend(['\\', c]),
            _ => quoted.push(c),
        }
    }
    format!("printf %s \"{quoted}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_variables_are_put_in() {
        for (value, wanted) in [
            ("/x:$PATH", "/x:/bin"),
            ("${PATH}y", "/biny"),
            ("a \"b\" `c` \\d $(e) $1 $", "a \"b\" `c` \\d $(e) $1 $"),
        ] {
            let out = std::process::Command::new("/bin/bash")
                .args(["-c", &expansion(value)])
                .env_clear()
                .env("PATH", "/bin")
                .output()
                .unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), wanted);
        }
    }
}
