//! Events of real directories. Called by cargo. Refuses to wait for time to pass: an event is there
//! once the call that makes it has returned.

use super::*;
use crate::filesystem::metadata::Metadata;
use EventType::{Chmod, Create, Remove, Rename, Write};

fn base_of(name: &str) -> PathBuf {
    let base = std::env::temp_dir().join(format!("mica-watch-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&base).unwrap();
    base
}

fn told(tree: &mut Tree) -> Vec<(EventType, String)> {
    let mut all = Vec::new();
    loop {
        let (happened, is_drained) = tree.read().unwrap();
        let event = |event: Happened| (event.kind, event.path.display().to_string());
        all.extend(happened.into_iter().map(event));
        if is_drained {
            return all;
        }
    }
}

fn events(wanted: &[(EventType, &str)]) -> Vec<(EventType, String)> {
    wanted.iter().map(|(kind, path)| (*kind, (*path).to_owned())).collect()
}

#[test]
fn one_directory_tells_what_is_in_it() {
    let base = base_of("one");
    std::fs::create_dir(base.join("below")).unwrap();
    let mut tree = Tree::open(&base, false).unwrap();
    assert_eq!(told(&mut tree), []);
    std::fs::write(base.join("a"), "1").unwrap();
    assert_eq!(told(&mut tree), events(&[(Create, "a"), (Write, "a")]));
    rustix::fs::chmod(base.join("a"), rustix::fs::Mode::from(0o600)).unwrap();
    std::fs::rename(base.join("a"), base.join("b")).unwrap();
    std::fs::remove_file(base.join("b")).unwrap();
    std::fs::write(base.join("below/c"), "not seen").unwrap();
    let wanted = [(Chmod, "a"), (Rename, "a"), (Create, "b"), (Remove, "b")];
    assert_eq!(told(&mut tree), events(&wanted));
    std::fs::remove_dir_all(&base).unwrap();
    let last = told(&mut tree);
    assert_eq!(last.last(), Some(&(Remove, ".".to_owned())), "{last:?}");
}

#[test]
fn a_tree_grows_moves_and_shrinks() {
    let base = base_of("tree");
    std::fs::create_dir_all(base.join("a/b")).unwrap();
    let mut tree = Tree::open(&base, true).unwrap();
    std::fs::write(base.join("a/b/f"), "1").unwrap();
    assert_eq!(told(&mut tree), events(&[(Create, "a/b/f"), (Write, "a/b/f")]));

    // What is in a new directory before it is watched is told, and once.
    std::fs::create_dir_all(base.join("new/deep")).unwrap();
    std::fs::write(base.join("new/deep/f"), "1").unwrap();
    std::fs::write(base.join("new/empty"), "").unwrap();
    let mut all = told(&mut tree);
    let rest = all.split_off(1);
    assert_eq!(all, events(&[(Create, "new")]));
    let of = |path: &str| rest.iter().filter(|(_, told)| told == path).cloned().collect::<Vec<_>>();
    assert_eq!(of("new/deep"), events(&[(Create, "new/deep")]));
    assert_eq!(of("new/empty"), events(&[(Create, "new/empty")]));
    let wanted = [(Create, "new/deep/f"), (Write, "new/deep/f")];
    assert_eq!(of("new/deep/f"), events(&wanted));
    assert_eq!(rest.len(), 4, "{rest:?}");

    // An upload into a new directory, which is found and whose rename comes as well.
    std::fs::create_dir(base.join("up")).unwrap();
    upload::put(&base.join("up/f"), &Metadata::new(), |file| {
        std::io::Write::write_all(file, b"1").unwrap();
        Ok(())
    })
    .unwrap();
    let wanted = [(Create, "up"), (Create, "up/f"), (Write, "up/f")];
    assert_eq!(told(&mut tree), events(&wanted));
    std::fs::write(base.join("new/deep/f"), "2").unwrap();
    assert_eq!(told(&mut tree), events(&[(Write, "new/deep/f")]));

    // Within the tree, a directory is known by its new name.
    std::fs::rename(base.join("a"), base.join("new/a")).unwrap();
    assert_eq!(told(&mut tree), events(&[(Rename, "a"), (Create, "new/a")]));
    std::fs::remove_file(base.join("new/a/b/f")).unwrap();
    assert_eq!(told(&mut tree), events(&[(Remove, "new/a/b/f")]));

    // Out of the tree, it is no longer watched; into it, it is.
    let outside = base_of("outside");
    std::fs::rename(base.join("new/a"), outside.join("a")).unwrap();
    assert_eq!(told(&mut tree), events(&[(Rename, "new/a")]));
    std::fs::write(outside.join("a/b/g"), "not seen").unwrap();
    assert_eq!(told(&mut tree), []);
    std::fs::rename(outside.join("a"), base.join("back")).unwrap();
    assert_eq!(told(&mut tree), events(&[(Create, "back")]));
    std::fs::remove_file(base.join("back/b/g")).unwrap();
    assert_eq!(told(&mut tree), events(&[(Remove, "back/b/g")]));

    std::fs::remove_dir_all(base.join("back")).unwrap();
    assert_eq!(told(&mut tree), events(&[(Remove, "back/b"), (Remove, "back")]));
    assert_eq!(tree.directories.len(), 4, "the root, new, new/deep and up");
    assert_eq!(tree.descriptors.len(), 4);
    std::fs::remove_dir_all(outside).unwrap();
    std::fs::remove_dir_all(base).unwrap();
}

#[test]
fn an_upload_is_told_as_a_write() {
    let base = base_of("upload");
    let mut tree = Tree::open(&base, false).unwrap();
    let put = |text: &str| {
        upload::put(&base.join("f"), &Metadata::new(), |file| {
            std::io::Write::write_all(file, text.as_bytes()).unwrap();
            Ok(())
        })
        .unwrap();
    };
    put("one");
    assert_eq!(told(&mut tree), events(&[(Create, "f"), (Write, "f")]));
    put("two");
    assert_eq!(told(&mut tree), events(&[(Write, "f")]));
    std::fs::remove_dir_all(base).unwrap();
}

#[test]
fn links_are_not_followed_below_the_root() {
    let base = base_of("links");
    let far = base_of("far");
    std::os::unix::fs::symlink(&far, base.join("link")).unwrap();
    let mut tree = Tree::open(&base, true).unwrap();
    std::fs::write(far.join("f"), "not seen").unwrap();
    assert_eq!(told(&mut tree), []);
    let mut through = Tree::open(&base.join("link"), true).unwrap();
    std::fs::remove_file(far.join("f")).unwrap();
    assert_eq!(told(&mut through), events(&[(Remove, "f")]));
    std::fs::remove_dir_all(far).unwrap();
    std::fs::remove_dir_all(base).unwrap();
}

#[test]
fn events_that_the_kernel_lost_are_an_error() {
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > 100_000 {
        eprintln!("skipped: {limit} events would have to happen here");
        return;
    }
    let base = base_of("lost");
    let mut tree = Tree::open(&base, false).unwrap();
    let (a, b) = (base.join("a"), base.join("b"));
    std::fs::write(&a, "").unwrap();
    // Each rename is two events, and no two that follow each other are the same.
    for _ in 0..=limit / 4 {
        std::fs::rename(&a, &b).unwrap();
        std::fs::rename(&b, &a).unwrap();
    }
    let error = loop {
        match tree.read() {
            Ok((_, is_drained)) => assert!(!is_drained, "nothing was said"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!(error.message.contains("events were lost"), "{error}");
    std::fs::remove_dir_all(base).unwrap();
}
