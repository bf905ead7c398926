//! The methods of `process.Process`.
//!
//! Called by the router with decoded messages. Refuses commands without a name, directories that
//! are not there, and users that the guest does not have.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::Signal;
use tokio::sync::{Notify, mpsc};

use super::hub::{Hub, Told};
use super::messages::{
    DataEvent, Event, EventResponse, Input, InputEvent, ProcessConfig, SelectRequest,
    SendInputRequest, SendSignalRequest, SignalName, StartEvent, StartRequest, StreamInputRequest,
    UpdateRequest, brought, named,
};
use super::pump::{Output, supervise};
use super::shim::{Spec, SpecUser};
use super::spawn::{self, Ends, SpawnError, Spawned, Terminal};
use super::table::{InputEnd, Process, Table};
use crate::connect::{self, Code, ConnectError, Context, Incoming, Nothing, StreamSender};
use crate::http::Router;
use crate::http::error::chain;
use crate::users::User;

/// Where commands are looked for when the agent itself has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

type Out = StreamSender<EventResponse>;

/// Registers the service.
pub fn register(router: &mut Router) {
    let table = Arc::new(Table::default());
    let keepalive: fn() -> EventResponse = || Event::Keepalive(Nothing {}).into();

    let t = Arc::clone(&table);
    let start = move |context, request, out| start(Arc::clone(&t), context, request, out);
    connect::server_stream(router, "process.Process/Start", Some(keepalive), start);

    let t = Arc::clone(&table);
    let watch = move |_: Context, request: SelectRequest, out| watch(Arc::clone(&t), request, out);
    connect::server_stream(router, "process.Process/Connect", Some(keepalive), watch);

    let t = Arc::clone(&table);
    connect::unary(router, "process.Process/List", move |_: Context, Nothing {}| {
        let list = t.list();
        async move { Ok(list) }
    });
    let t = Arc::clone(&table);
    connect::unary(router, "process.Process/SendInput", move |_: Context, request| {
        send_input(Arc::clone(&t), request)
    });
    let t = Arc::clone(&table);
    connect::client_stream(router, "process.Process/StreamInput", move |_: Context, incoming| {
        stream_input(Arc::clone(&t), incoming)
    });
    let t = Arc::clone(&table);
    connect::unary(router, "process.Process/CloseStdin", move |_: Context, request| {
        close_stdin(Arc::clone(&t), request)
    });
    let t = Arc::clone(&table);
    connect::unary(router, "process.Process/SendSignal", move |_: Context, request| {
        let sent = send_signal(&t, &request);
        async move { sent }
    });
    connect::unary(router, "process.Process/Update", move |_: Context, request| {
        let updated = update(&table, &request);
        async move { updated }
    });
}

async fn start(
    table: Arc<Table>,
    context: Context,
    request: StartRequest,
    out: Out,
) -> Result<(), ConnectError> {
    table.check_room()?;
    let user = context.user()?;
    let terminal = match request.pty {
        Some(pty) => Terminal::Pty(pty.size.unwrap_or_default()),
        None => Terminal::Pipes { stdin: request.stdin.unwrap_or(true) },
    };
    let config = request.process.unwrap_or_default();
    let spec = spec(&context, &user, &config, terminal)?;
    let spawned = spawn::spawn(&spec, terminal).await.map_err(|error| start_error(&error))?;
    let (process, child, output) = take_in(spawned, config, request.tag);
    let told = process.hub.subscribe().ok_or_else(too_many)?;
    table.add(Arc::clone(&process));
    // The deadline is the process's, whether or not the client stays to see it.
    tokio::spawn(supervise(table, Arc::clone(&process), child, output, context.deadline));
    tell(process.pid, told, &out).await
}

fn start_error(error: &SpawnError) -> ConnectError {
    match error {
        SpawnError::Refused(_) => ConnectError::invalid_argument(error.to_string()),
        // The guest is full, which its user can change: no more processes, descriptors, memory.
        SpawnError::Os { source, .. }
            if [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE]
                .iter()
                .any(|errno| source.raw_os_error() == Some(errno.raw_os_error())) =>
        {
            ConnectError::new(Code::ResourceExhausted, chain(error))
        }
        SpawnError::Os { .. } => ConnectError::internal(chain(error)),
    }
}

async fn watch(table: Arc<Table>, request: SelectRequest, out: Out) -> Result<(), ConnectError> {
    let process = table.find(named(request.process.as_ref())?)?;
    let told = process.hub.subscribe().ok_or_else(too_many)?;
    tell(process.pid, told, &out).await
}

fn too_many() -> ConnectError {
    ConnectError::new(Code::ResourceExhausted, "too many watch this process already")
}

/// Passes events on until the end or until the client leaves.
async fn tell(pid: u32, mut told: mpsc::Receiver<Told>, out: &Out) -> Result<(), ConnectError> {
    let mut event = Event::Start(StartEvent { pid });
    loop {
        if out.send(&event.into()).await.is_err() {
            return Ok(());
        }
        event = tokio::select! {
            told = told.recv() => match told {
                Some(Told::Data(data)) => Event::Data(DataEvent { output: Some(data) }),
                Some(Told::End(end)) => Event::End(end),
                None => return Ok(()),
            },
            () = out.closed() => return Ok(()),
        };
    }
}

fn take_in(
    spawned: Spawned,
    config: ProcessConfig,
    tag: Option<String>,
) -> (Arc<Process>, tokio::process::Child, Output) {
    let Spawned { child, pid, pidfd, ends } = spawned;
    let (input, terminal, output) = match ends {
        Ends::Pipes { stdin, stdout, stderr } => {
            let input = stdin.map_or(InputEnd::Closed, InputEnd::Pipe);
            (input, None, Output::Pipes(stdout, stderr))
        }
        Ends::Pty { input, output, control } => {
            (InputEnd::Pty(input), Some(control), Output::Pty(output))
        }
    };
    let process = Process {
        pid,
        tag,
        config,
        pidfd,
        hub: Hub::default(),
        input: tokio::sync::Mutex::new(input),
        terminal: std::sync::Mutex::new(terminal),
        killed: Notify::new(),
    };
    (Arc::new(process), child, output)
}

fn spec(
    context: &Context,
    user: &User,
    config: &ProcessConfig,
    terminal: Terminal,
) -> Result<Spec, ConnectError> {
    if config.cmd.is_empty() {
        return Err(ConnectError::invalid_argument("the process has no cmd"));
    }
    let cwd = context.sandbox.resolve_path(config.cwd.as_deref().unwrap_or(""), user);
    if !cwd.is_dir() {
        let cwd = cwd.display();
        return Err(ConnectError::invalid_argument(format!("cwd '{cwd}' does not exist")));
    }
    Ok(Spec {
        cmd: config.cmd.clone(),
        args: config.args.clone(),
        env: environment(context, user, &config.envs).into_iter().collect(),
        cwd,
        user: rustix::process::geteuid().is_root().then(|| SpecUser {
            uid: user.uid,
            gid: user.gid,
            groups: user.groups.clone(),
        }),
        controlling_terminal: matches!(terminal, Terminal::Pty(_)),
    })
}

/// The user's variables, then the sandbox's, then the call's: the last one wins.
fn environment(
    context: &Context,
    user: &User,
    call: &BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    let path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let mut all = BTreeMap::from([
        ("PATH".to_owned(), path),
        ("HOME".to_owned(), user.home.to_string_lossy().into_owned()),
        ("USER".to_owned(), user.name.clone()),
        ("LOGNAME".to_owned(), user.name.clone()),
    ]);
    all.extend(context.sandbox.environment_of(Some(&context.identity)));
    all.extend(call.iter().map(|(name, value)| (name.clone(), value.clone())));
    // What is not a variable's name would make the command fail to start.
    all.retain(|name, value| {
        !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
    });
    all
}

async fn send_input(table: Arc<Table>, request: SendInputRequest) -> Result<Nothing, ConnectError> {
    let process = table.find_running(named(request.process.as_ref())?)?;
    feed(&process, brought(request.input.as_ref())?).await?;
    Ok(Nothing {})
}

/// Input in the order it comes in, each message written before the next one is read.
async fn stream_input(
    table: Arc<Table>,
    mut incoming: Incoming<StreamInputRequest>,
) -> Result<Nothing, ConnectError> {
    let mut process: Option<Arc<Process>> = None;
    while let Some(request) = incoming.next().await? {
        match request.event {
            Some(InputEvent::Start(start)) => {
                process = Some(table.find_running(named(start.process.as_ref())?)?);
            }
            Some(InputEvent::Data(data)) => {
                let process = process.as_ref().ok_or_else(|| {
                    ConnectError::invalid_argument("input came before `start` said what it is for")
                })?;
                feed(process, brought(data.input.as_ref())?).await?;
            }
            Some(InputEvent::Keepalive(_)) => {}
            None => {
                return Err(ConnectError::invalid_argument(
                    "a message is none of `start`, `data` and `keepalive`",
                ));
            }
        }
    }
    Ok(Nothing {})
}

async fn feed(process: &Process, input: &Input) -> Result<(), ConnectError> {
    match input {
        Input::Stdin(bytes) => process.write_stdin(bytes).await,
        Input::Pty(bytes) => process.write_terminal(bytes).await,
    }
}

async fn close_stdin(table: Arc<Table>, request: SelectRequest) -> Result<Nothing, ConnectError> {
    table.find_running(named(request.process.as_ref())?)?.close_stdin().await?;
    Ok(Nothing {})
}

fn send_signal(table: &Table, request: &SendSignalRequest) -> Result<Nothing, ConnectError> {
    let signal = match SignalName::try_from(request.signal) {
        Ok(SignalName::Term) => Signal::TERM,
        Ok(SignalName::Kill) => Signal::KILL,
        Ok(SignalName::Unspecified) | Err(_) => {
            return Err(ConnectError::invalid_argument(
                "the signal is neither SIGNAL_SIGTERM nor SIGNAL_SIGKILL",
            ));
        }
    };
    table.find_running(named(request.process.as_ref())?)?.signal(signal)?;
    Ok(Nothing {})
}

fn update(table: &Table, request: &UpdateRequest) -> Result<Nothing, ConnectError> {
    let process = table.find_running(named(request.process.as_ref())?)?;
    if let Some(size) = request.pty.and_then(|pty| pty.size) {
        process.resize(size)?;
    }
    Ok(Nothing {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_guest_is_told_apart_from_a_fault_of_ours() {
        let os = |errno: Errno| {
            start_error(&SpawnError::Os { what: "start the shim", source: errno.into() }).code
        };
        assert_eq!(os(Errno::AGAIN), Code::ResourceExhausted);
        assert_eq!(os(Errno::NOMEM), Code::ResourceExhausted);
        assert_eq!(os(Errno::IO), Code::Internal);
        let refused = start_error(&SpawnError::Refused("fork/exec x".to_owned()));
        assert_eq!(refused.code, Code::InvalidArgument);
    }
}
