//! Sandboxes that come up: what they are, how they end, and that streams into them work.
//!
//! Against the double.

use std::time::{Duration, SystemTime};

use mica_shards::{ConnectError, CreateRequest, NetworkPolicy, ShardError, Visitor, rt};
use mica_units::{GuestPort, SANDBOX_ID_CHARS, SandboxId};

use crate::common::{
    BASE_REGISTER, Bench, Leftovers, assert_memory, base_memory, memory, port, read_all, request,
    tell,
};
use crate::wait::eventually;

#[test]
fn ports_that_are_not_public_take_a_token_and_envds_does_not() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let closed = NetworkPolicy { allow_public_traffic: false, ..NetworkPolicy::default() };
        let wish = CreateRequest { network: closed.clone(), ..request("agent") };
        let made = host.create(wish).await.unwrap();
        let (id, token) = (made.id, made.traffic_token.unwrap());
        let client = |token: Option<&str>| Visitor::Client(token.map(str::to_owned));
        let near = token.replace(token.chars().last().unwrap(), "x");
        for wrong in [None, Some(""), Some("x"), Some(&*near)] {
            let refused = host.visit(id, port(7), client(wrong)).await.unwrap_err();
            assert_eq!(refused, ConnectError::NotAdmitted(id), "{wrong:?}");
        }
        assert!(host.visit(id, port(7), client(Some(&token))).await.is_ok());
        assert!(host.connect(id, port(7)).await.is_ok(), "the host itself needs none");
        // Nothing listens there in this guest; the point is that it was asked.
        let envd = host.visit(id, GuestPort::ENVD, client(None)).await;
        assert!(!matches!(envd, Err(ConnectError::NotAdmitted(_))));

        let mask = Some("app-${PORT}.example".to_owned());
        let open = NetworkPolicy { mask_request_host: mask, ..NetworkPolicy::default() };
        host.set_network(id, open.clone()).await.unwrap();
        let info = host.get(id).await.unwrap();
        assert_eq!((info.network, info.traffic_token), (open, None));
        let stream = host.visit(id, port(7), client(None)).await.unwrap();
        assert_eq!(stream.masked_host(), Some("app-7.example"));

        host.pause(id).await.unwrap();
        let refused = host.set_network(id, closed).await;
        assert!(matches!(refused, Err(ShardError::IsPaused(at)) if at == id), "{refused:?}");
        host.kill(id).await.unwrap();
    });
}

#[test]
fn what_is_set_and_cannot_be_written_down_is_not_answered_as_if_it_were() {
    let bench = Bench::new();
    let store = bench.store();
    bench.host("good", move |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let life = Duration::from_secs(600);
        // Where the record is first written lies a directory with something in it.
        let block = store.join("sandboxes").join(id.as_str()).join("record.new");
        std::fs::create_dir_all(block.join("in")).unwrap();
        let timeout = host.set_timeout(id, life).await;
        let network = host.set_network(id, NetworkPolicy::default()).await;
        for set in [timeout, network] {
            let is_told = matches!(&set, Err(ShardError::OperationFailed { reason, .. }) if reason.contains("written down"));
            assert!(is_told, "{set:?}");
        }
        std::fs::remove_dir_all(&block).unwrap();
        host.set_timeout(id, life).await.unwrap();
        host.kill(id).await.unwrap();
    });
}

#[test]
fn a_sandbox_is_made_found_listed_and_killed() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let mut wish = request("agent");
        wish.secure = true;
        let before = SystemTime::now();
        let made = host.create(wish).await.unwrap();
        assert_eq!(made.template_name.as_str(), "agent");
        assert_eq!(made.envd_version, "9.9.9", "as the agent said");
        assert_eq!((made.vcpus.get(), made.memory.count(), made.disk.count()), (2, 16, 3));
        assert_eq!(made.metadata["who"], "a test");
        assert!(made.started_at >= before);
        let life = made.end_at.unwrap().duration_since(made.started_at).unwrap();
        assert!(life.abs_diff(Duration::from_secs(600)) < Duration::from_secs(5), "{life:?}");
        let token = made.access_token.clone().unwrap();
        assert!(token.len() == 64 && token.bytes().all(|b| b.is_ascii_hexdigit()));

        assert_eq!(host.get(made.id).await.unwrap(), made);
        assert_eq!(host.list().await.unwrap(), std::slice::from_ref(&made));
        let about = read_all(&host, made.id, 14).await;
        let told = format!("times=1\nid={}\ntemplate={}\n", made.id, made.template_id);
        assert!(about.starts_with(&told), "{about}");
        let rest = format!("new=true\ntoken={token}\nCOLOUR=green\n");
        assert!(about.ends_with(&rest), "{about}");
        // What the running snapshot holds is what it starts with.
        assert_memory(&memory(&host, made.id).await, &base_memory(), "at first");
        assert_eq!(tell(&host, made.id, "register").await, BASE_REGISTER.to_string());
        assert_eq!(tell(&host, made.id, "disk").await, "template");
        tell(&host, made.id, "disk mine").await;
        let disk = places.store().join("sandboxes").join(made.id.as_str()).join("disk");
        assert_eq!(&std::fs::read(disk).unwrap()[..5], b"mine\0", "a clone of its own");
        assert_eq!(places.cgroups().len(), 1);

        host.kill(made.id).await.unwrap();
        assert_eq!(places.leftovers(), Leftovers::default(), "gone when the answer comes");
        let again = host.kill(made.id).await;
        assert!(matches!(again, Err(ShardError::NoSuchSandbox(id)) if id == made.id));
        assert!(host.get(made.id).await.is_err());
        assert!(host.list().await.unwrap().is_empty());
        let second = host.create(request("agent")).await.unwrap();
        assert_eq!(tell(&host, second.id, "disk").await, "template", "the template is as it was");
    });
}

#[test]
fn a_console_template_is_ready_without_an_agent() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let made = host.create(request("console")).await.unwrap();
        assert_eq!(made.envd_version, "0.0.1", "as the template says");
        assert_eq!(made.access_token, None);
        let templates = host.templates().await.unwrap();
        let console = templates.iter().find(|t| t.name.as_str() == "console").unwrap();
        assert_eq!((console.spawn_count, console.last_spawned_at), (1, Some(made.started_at)));
        let agent = templates.iter().find(|t| t.name.as_str() == "agent").unwrap();
        assert_eq!((agent.spawn_count, agent.last_spawned_at), (0, None));
    });
}

#[test]
fn streams_that_cannot_be_are_told_apart() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let refused = host.connect(id, port(8080)).await.unwrap_err();
        assert_eq!(refused, ConnectError::PortNotOpen(port(8080)));
        let bad = host.connect(id, port(12)).await.unwrap_err();
        assert_eq!(bad, ConnectError::Unreachable);
        let nobody = SandboxId::from_random([3; SANDBOX_ID_CHARS]);
        let none = host.connect(nobody, port(7)).await.unwrap_err();
        assert_eq!(none, ConnectError::NoSuchSandbox(nobody));
        let mute = host.connect(id, port(13));
        let late = rt::time::timeout(Duration::from_millis(50), mute).await;
        assert!(late.is_err(), "a mute guest holds up its caller only");
        assert!(host.connect(id, port(7)).await.is_ok());
    });
}

#[test]
fn a_vm_process_that_takes_no_commands_does_not_hold_up_the_shard() {
    let bench = Bench::new();
    bench.host("stops-reading", |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let mut tasks = Vec::new();
        for _ in 0..400 {
            let host = host.clone();
            tasks.push(rt::spawn(async move {
                let connect = host.connect(id, port(7));
                rt::time::timeout(Duration::from_secs(4), connect).await
            }));
        }
        let begun = rt::time::Instant::now();
        assert_eq!(host.list().await.unwrap().len(), 1);
        assert!(begun.elapsed() < Duration::from_secs(2), "the shard answers meanwhile");
        let mut busy = 0;
        for task in tasks {
            match task.join().await.unwrap() {
                Ok(Err(ConnectError::Busy)) => busy += 1,
                // Taken by the socket, answered by nobody.
                Err(rt::time::Elapsed) => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(busy > 0, "the socket's room has an end");
        host.kill(id).await.unwrap();
    });
}

#[test]
fn a_sandbox_dies_when_its_time_is_over_and_not_before() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let mut wish = request("agent");
        wish.timeout = Duration::from_millis(300);
        let short = host.create(wish.clone()).await.unwrap();
        let longer = host.create(wish).await.unwrap();
        host.set_timeout(longer.id, Duration::from_secs(600)).await.unwrap();
        let end_at = host.get(longer.id).await.unwrap().end_at;
        assert!(end_at.unwrap() > longer.end_at.unwrap() + Duration::from_secs(500));
        let id = short.id;
        eventually("the short one ends", async || host.get(id).await.is_err()).await;
        let early = short.end_at.unwrap().duration_since(SystemTime::now());
        assert!(early.is_err(), "it ended {early:?} before its time");
        assert!(host.get(longer.id).await.is_ok());
        host.set_timeout(longer.id, Duration::ZERO).await.unwrap();
        let id = longer.id;
        eventually("the longer one ends", async || host.get(id).await.is_err()).await;
        let late = host.set_timeout(id, Duration::from_secs(1)).await;
        assert!(matches!(late, Err(ShardError::NoSuchSandbox(_))));
    });
}

#[test]
fn a_guest_that_ends_takes_its_sandbox_with_it_and_no_other() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let bystander = host.create(request("agent")).await.unwrap().id;
        // Powers off, crashes, sends garbage, repeats itself without end, thaws unasked.
        for end in [9, 10, 11, 15, 17] {
            let id = host.create(request("agent")).await.unwrap().id;
            let answer = host.connect(id, port(end)).await;
            assert!(answer.is_err(), "port {end} ends the guest");
            eventually("it is gone", async || {
                matches!(host.get(id).await, Err(ShardError::NoSuchSandbox(_)))
            })
            .await;
            assert!(matches!(host.kill(id).await, Err(ShardError::NoSuchSandbox(_))));
        }
        assert!(read_all(&host, bystander, 14).await.ends_with("token=\nCOLOUR=green\n"));
    });
}

#[test]
fn children_of_a_vm_process_die_with_it() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("with-children", move |host| async move {
        let id = host.create(request("agent")).await.unwrap().id;
        let pids = places.pids();
        assert_eq!(pids.len(), 4, "the double and three children");
        host.kill(id).await.unwrap();
        for pid in pids {
            let status = std::fs::read_to_string(format!("/proc/{pid}/stat"));
            let dead = status.map_or(true, |stat| stat.contains(") Z "));
            assert!(dead, "process {pid} lives");
        }
    });
}

#[test]
fn a_drain_ends_everything_and_refuses_what_comes_late() {
    let bench = Bench::new();
    let ended = bench.host_with(bench.config(), |host| async move {
        for _ in 0..6 {
            host.create(request("agent")).await.unwrap();
        }
        assert_eq!(host.list().await.unwrap().len(), 6);
    });
    ended.unwrap();
    assert_eq!(bench.leftovers(), Leftovers::default());
}

#[test]
fn a_vm_process_inherits_nothing_of_the_daemon() {
    let bench = Bench::new();
    let places = bench.clone();
    bench.host("good", move |host| async move {
        let listener = rt::net::TcpListener::bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let client = rt::net::TcpStream::connect(address).await.unwrap();
        let waiting = listener.accept().await.unwrap();
        let second = rt::spawn(async move { listener.accept().await.unwrap() });
        rt::yield_now().await;
        let late = rt::net::TcpStream::connect(address).await.unwrap();
        let waited = second.join().await.unwrap();
        let id = host.create(request("agent")).await.unwrap().id;
        let pid = places.pids()[0].to_string();
        // The stream of the exchange with the agent may not be closed yet.
        let only_control = async || sockets(&pid).len() == 2;
        eventually("both ends of its control socket are its only ones", only_control).await;
        let shared: Vec<_> = sockets(&pid).intersection(&sockets("self")).cloned().collect();
        assert_eq!(shared.len(), 1, "the shard's end is kept for the next daemon");
        host.kill(id).await.unwrap();
        drop((client, waiting, late, waited));
    });
}

fn sockets(pid: &str) -> std::collections::BTreeSet<String> {
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    // One may be closed while we look.
    let names = links.filter_map(|link| std::fs::read_link(link.ok()?.path()).ok());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    names.filter(|name| name.starts_with("socket:")).collect()
}

#[test]
fn as_much_environment_as_an_agent_takes_is_kept() {
    let bench = Bench::new();
    bench.host("good", |host| async move {
        let mut wish = request("agent");
        wish.env_vars.insert("LONG".to_owned(), "x".repeat(150 << 10));
        let id = host.create(wish).await.unwrap().id;
        assert!(read_all(&host, id, 14).await.contains(&"x".repeat(150 << 10)));
        host.pause(id).await.unwrap();
        host.resume(id, Duration::from_secs(60), None).await.unwrap();
        // What is more than an agent takes is refused, and says so.
        let mut wish = request("agent");
        wish.env_vars.insert("LONG".to_owned(), "x".repeat(300 << 10));
        let error = host.create(wish).await.unwrap_err();
        assert!(error.to_string().contains("env_vars"), "{error}");
    });
}
