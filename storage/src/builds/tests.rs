//! Built templates, builds and uploads, on a real directory.

use std::fs;

use mica_units::TenantId;

use super::*;
use crate::testing::TempDir;

fn store() -> (TempDir, BuildStore) {
    let directory = TempDir::new();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, store.builds())
}

fn tenant(name: &str) -> TenantId {
    name.parse().unwrap()
}

fn announced(template: &BuiltTemplate) -> BuildRecord {
    BuildRecord {
        id: String::new(),
        template_id: template.id.clone(),
        tenant: template.tenant.clone(),
        name: template.name.clone(),
        tags: vec![DEFAULT_TAG.to_owned()],
        vcpus: Some(2),
        memory_mib: None,
        created_unix_ms: 0,
        updated_unix_ms: 0,
        phase: BuildPhase::Announced,
    }
}

fn built(n: u32) -> Built {
    Built {
        build_id: format!("{n:08}-0000-4000-8000-000000000000"),
        snapshot_id: format!("{n:020}"),
        created_unix_ms: 1,
        finished_unix_ms: 2,
        vcpus: 2,
        memory_mib: 1024,
        disk_mib: 4096,
        envd_version: "0.5.7".to_owned(),
        defaults: BuiltDefaults::default(),
    }
}

fn tags(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

#[test]
fn the_golden_files_are_read_and_written_the_same() {
    let defaults = BuiltDefaults {
        env: [("A".to_owned(), "1".to_owned())].into(),
        workdir: Some("/app".to_owned()),
        user: None,
    };
    let template = BuiltTemplate {
        id: "0123456789abcdefghij".to_owned(),
        tenant: "acme-1".to_owned(),
        name: "app".to_owned(),
        public: true,
        created_unix_ms: 1_790_000_000_123,
        updated_unix_ms: 1_790_000_000_456,
        build_count: 7,
        tags: vec![BuiltTag {
            tag: "v1".to_owned(),
            build_id: built(1).build_id,
            assigned_unix_ms: 1_790_000_000_456,
        }],
        builds: vec![Built { defaults, ..built(1) }],
    };
    let failed = BuildPhase::Failed { message: "no".to_owned(), step: Some("3".to_owned()) };
    let record = BuildRecord { id: built(1).build_id, phase: failed, ..announced(&template) };
    // `MICA_WRITE_GOLDENS=1` writes them, for a new version of a format only.
    if std::env::var_os("MICA_WRITE_GOLDENS").is_some() {
        fs::write(golden("built-template-v1.bin"), template.encode().unwrap()).unwrap();
        fs::write(golden("build-record-v1.bin"), record.encode().unwrap()).unwrap();
        return;
    }
    let stored = fs::read(golden("built-template-v1.bin")).unwrap();
    assert_eq!(BuiltTemplate::decode(&stored).unwrap(), template);
    assert_eq!(template.encode().unwrap(), stored);
    let stored = fs::read(golden("build-record-v1.bin")).unwrap();
    assert_eq!(BuildRecord::decode(&stored).unwrap(), record);
    assert_eq!(record.encode().unwrap(), stored);
    let mut damaged = stored;
    *damaged.last_mut().unwrap() ^= 1;
    assert!(BuildRecord::decode(&damaged).is_err());
}

#[test]
fn references_in_every_form() {
    let parsed = |text: &str| {
        Reference::parse(text).map(|r| (r.namespace.clone(), r.name.clone(), r.tag().to_owned()))
    };
    let some = |space: Option<&str>, name: &str, tag: &str| {
        Some((space.map(str::to_owned), name.to_owned(), tag.to_owned()))
    };
    assert_eq!(parsed("app"), some(None, "app", DEFAULT_TAG));
    assert_eq!(parsed("App:V1.2"), some(None, "app", "v1.2"));
    assert_eq!(parsed("team/app:x"), some(Some("team"), "app", "x"));
    for bad in ["", "a/b/c", "a:", ":a", "/a", "../a", "a:b:c", "a:../b", "a b", "a:b/c"] {
        assert_eq!(parsed(bad), None, "{bad}");
    }
}

#[test]
fn tags_keep_builds_and_the_last_one_lets_go() {
    let (_directory, builds) = store();
    let ours = tenant("a");
    let template = builds.template_for(&ours, "app").unwrap();
    assert_eq!(builds.template_for(&ours, "app").unwrap(), template, "a name is one template");
    let find = |text: &str| {
        builds.find_built(&ours, &Reference::parse(text).unwrap()).unwrap().map(|t| t.id)
    };
    assert_eq!(find("app"), Some(template.id.clone()));
    assert_eq!(find(&template.id), Some(template.id.clone()));
    assert_eq!(find("a/app"), Some(template.id.clone()));
    assert_eq!(find("b/app"), None);

    let id = &template.id;
    let freed = builds.add_built(id, &tags(&["default", "v1"]), built(1)).unwrap();
    assert_eq!(freed, Some(vec![]));
    // `v1` still stands for the first.
    assert_eq!(builds.add_built(id, &tags(&["default"]), built(2)).unwrap(), Some(vec![]));
    assert_eq!(builds.recover().unwrap().unwrap().len(), 2);
    let (moved, freed) = builds.assign_tags(id, "default", &tags(&["v1"])).unwrap().unwrap();
    assert_eq!((moved, freed), (built(2).build_id, vec![built(1).snapshot_id]));
    assert_eq!(builds.assign_tags(id, "nope", &tags(&["x"])).unwrap(), None);
    assert_eq!(builds.remove_tags(id, &tags(&["nope"])).unwrap(), None);
    assert_eq!(builds.remove_tags(id, &tags(&["v1"])).unwrap(), Some(vec![]));
    let found = builds.built_templates(&ours).unwrap().remove(0);
    assert_eq!(found.tagged("default"), Some(&built(2)));
    assert_eq!((found.build_count, found.tags.len()), (2, 1));

    assert_eq!(builds.remove_built(id).unwrap(), Some(vec![built(2).snapshot_id]));
    assert_eq!(builds.add_built(id, &tags(&["default"]), built(3)).unwrap(), None);
    assert_eq!(builds.recover().unwrap().unwrap().len(), 0);
}

#[test]
fn other_tenants_see_what_is_public() {
    let (_directory, builds) = store();
    let template = builds.template_for(&tenant("a"), "app").unwrap();
    let theirs = |text: &str| {
        let found = builds.find_built(&tenant("b"), &Reference::parse(text).unwrap());
        found.unwrap().is_some()
    };
    assert!(!theirs("a/app") && !theirs(&template.id) && !theirs("app"));
    builds.set_public(&template.id, true).unwrap().unwrap();
    assert!(theirs("a/app") && theirs(&template.id));
    assert!(!theirs("app"), "a plain name is one of the tenant's own");
}

#[test]
fn a_damaged_template_keeps_every_snapshot() {
    let (directory, builds) = store();
    let template = builds.template_for(&tenant("a"), "app").unwrap();
    let path = directory.path().join("store/builds/templates").join(&template.id);
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    assert_eq!(builds.recover().unwrap(), None);
}

#[test]
fn a_restart_ends_builds_that_ran() {
    let (_directory, builds) = store();
    let ours = tenant("a");
    let template = builds.template_for(&ours, "app").unwrap();
    let waits = builds.announce(announced(&template)).unwrap();
    let runs = builds.announce(announced(&template)).unwrap();
    let begun = builds.begin_run(runs.clone()).unwrap().unwrap();
    assert_eq!(builds.begin_run(runs.clone()).unwrap(), None, "a build is started once");
    builds.write_log(&runs.id, 0, b"one\n").unwrap();
    builds.write_log(&runs.id, 4, b"two\n").unwrap();
    builds.set_phase(begun, BuildPhase::Building).unwrap();
    builds.recover().unwrap();
    let phase = |id: &str| builds.run(&ours, id).unwrap().unwrap().phase;
    assert_eq!(phase(&waits.id), BuildPhase::Announced);
    assert!(matches!(phase(&runs.id), BuildPhase::Failed { message, step: None }
        if message.contains("restarted")));
    assert_eq!(builds.read_log(&runs.id).unwrap(), b"one\ntwo\n");
    assert_eq!(builds.run(&tenant("b"), &runs.id).unwrap(), None, "it is another's");
    assert_eq!(builds.run(&ours, "../../x").unwrap(), None);
}

#[test]
fn builds_are_found_by_their_tenant_the_newest_first() {
    let (directory, builds) = store();
    let [ours, theirs] = ["a", "b"].map(tenant);
    let [app, other] = [&ours, &theirs].map(|owner| builds.template_for(owner, "app").unwrap());
    let made: Vec<String> = (0..3).map(|_| builds.announce(announced(&app)).unwrap().id).collect();
    builds.announce(announced(&other)).unwrap();
    let ids = |owner: &TenantId| -> Vec<String> {
        builds.runs_of(owner).unwrap().into_iter().map(|run| run.id).collect()
    };
    let found = ids(&ours);
    assert!(found.len() == 3 && made.iter().all(|id| found.contains(id)), "{found:?}");
    assert_eq!(ids(&theirs).len(), 1);
    assert!(ids(&tenant("nobody")).is_empty());
    let times = builds.runs_of(&ours).unwrap();
    assert!(times.is_sorted_by(|a, b| a.created_unix_ms >= b.created_unix_ms));
    // The index is a hint: what it lacks, or has too much, a start puts right.
    let histories = directory.path().join("store/builds/histories");
    fs::remove_dir_all(&histories).unwrap();
    assert!(ids(&ours).is_empty());
    builds.recover().unwrap();
    assert_eq!(ids(&ours), found);
    fs::remove_dir_all(directory.path().join("store/builds/runs").join(&found[0])).unwrap();
    assert_eq!(ids(&ours), found[1..]);
    builds.recover().unwrap();
    assert_eq!(fs::read_dir(histories.join("a")).unwrap().count(), 2);
}

#[test]
fn slots_are_a_tenants_own() {
    let (_directory, builds) = store();
    let first = builds.take_slot(&tenant("a"), 2).unwrap();
    let second = builds.take_slot(&tenant("a"), 2).unwrap();
    assert!(first.is_some() && second.is_some());
    assert!(builds.take_slot(&tenant("a"), 2).unwrap().is_none());
    assert!(builds.take_slot(&tenant("b"), 2).unwrap().is_some());
    drop(first);
    assert!(builds.take_slot(&tenant("a"), 2).unwrap().is_some());
}

#[test]
fn uploads_come_whole_or_not_at_all_and_the_oldest_go() {
    let (directory, builds) = store();
    let ours = tenant("a");
    let upload = |hash: &str, bytes: &[u8]| {
        let token = builds.grant_upload(&ours, hash).unwrap();
        let grant = builds.grant_of(&token).unwrap().unwrap();
        let mut upload = builds.begin_upload(&grant, bytes.len() as u64, 10)?;
        upload.write(bytes)?;
        upload.finish()?;
        builds.end_grant(&token)?;
        assert!(builds.grant_of(&token)?.is_none(), "a link works once");
        Ok::<(), BuildStoreError>(())
    };
    upload("aa", b"123456").unwrap();
    assert!(builds.has_upload(&ours, "aa").unwrap());
    assert!(!builds.has_upload(&tenant("b"), "aa").unwrap());
    assert_eq!(builds.open_upload(&ours, "aa").unwrap().unwrap().1, 6);
    upload("bb", b"123456").unwrap();
    assert!(!builds.has_upload(&ours, "aa").unwrap(), "there was room for one");
    let full = upload("cc", b"12345678901").unwrap_err();
    assert!(matches!(full, BuildStoreError::TooMany(_)), "{full}");

    let token = builds.grant_upload(&ours, "dd").unwrap();
    let grant = builds.grant_of(&token).unwrap().unwrap();
    let mut cut_off = builds.begin_upload(&grant, 3, 10).unwrap();
    cut_off.write(b"12").unwrap();
    drop(cut_off);
    assert!(!builds.has_upload(&ours, "dd").unwrap());
    let left = fs::read_dir(directory.path().join("store/builds/uploads/a")).unwrap().count();
    assert!(left <= 1, "an upload that was cut off leaves nothing");
    for bad in ["", "../x", "a/b", ".new-x"] {
        assert!(!BuildStore::is_hash(bad), "{bad}");
        assert!(builds.grant_of(bad).unwrap().is_none());
    }
}

#[test]
fn a_lookup_reads_the_templates_of_one_tenant_alone() {
    let (directory, builds) = store();
    let (acme, other) = (tenant("acme"), tenant("other"));
    let ours = builds.template_for(&acme, "app").unwrap();
    let theirs = builds.template_for(&other, "app").unwrap();
    let root = directory.path().join("store/builds");
    // What is not in the other's index is not looked at, whatever lies among the templates.
    fs::remove_file(root.join("tenants/other").join(&theirs.id)).unwrap();
    let names = |of: &TenantId| builds.built_templates(of).unwrap().len();
    assert_eq!((names(&acme), names(&other)), (1, 0));
    let app = Reference::parse("app").unwrap();
    assert_eq!(builds.find_built(&acme, &app).unwrap(), Some(ours.clone()));
    assert_eq!(builds.find_built(&other, &app).unwrap(), None);
    // A store of a version without an index, and one whose index has what is gone.
    fs::remove_dir_all(root.join("tenants/other")).unwrap();
    fs::write(root.join("tenants/acme/0123456789abcdefghij"), "").unwrap();
    assert_eq!(names(&acme), 1);
    builds.recover().unwrap();
    assert_eq!((names(&acme), names(&other)), (1, 1));
    assert!(!root.join("tenants/acme/0123456789abcdefghij").exists());
    assert_eq!(builds.find_built(&other, &app).unwrap(), Some(theirs));
    builds.remove_built(&ours.id).unwrap().unwrap();
    assert_eq!(fs::read_dir(root.join("tenants/acme")).unwrap().count(), 0);
}

#[test]
fn a_build_that_could_not_begin_can_begin_again() {
    let (directory, builds) = store();
    let template = builds.template_for(&tenant("acme"), "app").unwrap();
    let run = builds.announce(announced(&template)).unwrap();
    let state = directory.path().join("store/builds/runs").join(&run.id).join("state");
    // A directory in place of what is to be written beside it.
    let beside = state.with_file_name(".new-state");
    fs::create_dir(&beside).unwrap();
    builds.begin_run(run.clone()).unwrap_err();
    fs::remove_dir(&beside).unwrap();
    let begun = builds.begin_run(run.clone()).unwrap().expect("it begins");
    assert_eq!(begun.phase, BuildPhase::Waiting);
    assert_eq!(builds.begin_run(run).unwrap(), None);
}

#[test]
fn builds_that_run_when_the_host_stops_are_over_at_once() {
    let (_directory, builds) = store();
    let acme = tenant("acme");
    let template = builds.template_for(&acme, "app").unwrap();
    let run = builds.announce(announced(&template)).unwrap();
    let waits = builds.announce(announced(&template)).unwrap();
    builds.begin_run(run.clone()).unwrap().unwrap();
    builds.end_at_stop().unwrap();
    let phase = |id: &str| builds.run(&acme, id).unwrap().unwrap().phase;
    let BuildPhase::Failed { message, .. } = phase(&run.id) else { panic!("it still runs") };
    assert!(message.contains("was stopped"), "{message}");
    assert_eq!(phase(&waits.id), BuildPhase::Announced, "it may be begun on the next start");
}
