//! The script that unpacks a COPY step's archive, run here as it runs in a guest.
//!
//! Called by `cargo test`. The host itself never unpacks: what is shown is that the guest's own files are
//! where the client meant them.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::steps::COPY;

struct Site(PathBuf);

impl Drop for Site {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

impl Site {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mica-copy-{name}-{}", std::process::id()));
        std::fs::create_dir_all(path.join("context/src/deep")).unwrap();
        for (file, content) in [("a.txt", "a"), ("src/b.txt", "b"), ("src/deep/c.txt", "c")] {
            std::fs::write(path.join("context").join(file), content).unwrap();
        }
        Self(path)
    }

    fn archive(&self, flags: &[&str], members: &[&str]) -> PathBuf {
        let archive = self.0.join("archive.tar");
        let status = Command::new("tar")
            .arg("-czf")
            .arg(&archive)
            .arg("-C")
            .arg(self.0.join("context"))
            .args(flags)
            .args(members)
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        archive
    }

    fn copy(&self, archive: &Path, args: [&str; 4]) -> Output {
        let out = Command::new("/bin/bash")
            .args(["-c", COPY, "mica-build"])
            .arg(archive)
            .args(args)
            .arg("no-such-user")
            .current_dir(&self.0)
            .output()
            .unwrap();
        assert!(!archive.exists(), "the archive goes, also when it cannot be used");
        out
    }

    fn has(&self, path: &str) -> bool {
        self.0.join(path).exists()
    }
}

#[test]
fn files_and_directories_land_where_docker_puts_them() {
    for (name, source, target, wanted) in [
        ("file", "a.txt", "new/name.txt", "new/name.txt"),
        ("into", "a.txt", "dir/", "dir/a.txt"),
        ("tree", "src", "app", "app/deep/c.txt"),
        ("slash", "./src/", "app/", "app/b.txt"),
        ("glob", "src/*", "app", "app/b.txt"),
        ("one", "*.txt", "app/", "app/a.txt"),
        ("all", ".", "app", "app/src/deep/c.txt"),
    ] {
        let site = Site::new(name);
        let archive = site.archive(&[], &["a.txt", "src"]);
        let out = site.copy(&archive, [source, target, "", ""]);
        assert!(out.status.success(), "{name}: {}", String::from_utf8_lossy(&out.stderr));
        assert!(site.has(wanted), "{name}");
    }
}

#[test]
fn a_mode_is_given_and_what_is_not_there_is_told() {
    use std::os::unix::fs::PermissionsExt;
    let site = Site::new("mode");
    let archive = site.archive(&[], &["a.txt"]);
    assert!(site.copy(&archive, ["a.txt", "x", "", "0751"]).status.success());
    let mode = std::fs::metadata(site.0.join("x")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o751);
    let archive = site.archive(&[], &["a.txt"]);
    let out = site.copy(&archive, ["*.md", "x", "", ""]);
    assert!(!out.status.success());
    assert!(String::from_utf8_lossy(&out.stderr).contains("nothing uploaded is called *.md"));
    std::fs::write(site.0.join("archive.tar"), "no archive").unwrap();
    assert!(!site.copy(&site.0.join("archive.tar"), ["a", "x", "", ""]).status.success());
}

#[test]
fn an_archive_that_points_outside_stays_inside() {
    let site = Site::new("hostile");
    let outside = site.0.join("outside");
    let absolute = outside.display().to_string();
    std::fs::write(&outside, "hostile").unwrap();
    std::fs::write(site.0.join("up"), "hostile").unwrap();
    std::os::unix::fs::symlink(&site.0, site.0.join("context/link")).unwrap();
    let archive = site.archive(&["-P"], &["a.txt", "../up", "link", &absolute]);
    std::fs::remove_file(&outside).unwrap();
    std::fs::remove_file(site.0.join("up")).unwrap();
    site.copy(&archive, ["a.txt", "x", "", "0777"]);
    assert!(!outside.exists() && !site.has("up"), "neither by its name nor by `..`");
}
