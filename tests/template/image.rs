//! Templates of images of containers: archives are made here, entry by entry, and what is built of them is looked at.
//!
//! Called by `cargo test`. The image's own programs are scripts that do nothing, and the machine's shell.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

use crate::place::{Place, is_root, names, static_program, text};

/// One layer, as it grows.
struct Layer(tar::Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn entry(mut self, kind: EntryType, name: &str, (mode, owner): (u32, u64), of: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        // Whatever the name is: `set_path` would refuse what a hostile image has.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_000_000_000);
        let content = if kind == EntryType::Regular { of } else { b"" };
        if matches!(kind, EntryType::Symlink | EntryType::Link) {
            header.set_link_name_literal(of).unwrap();
        }
        header.set_size(content.len() as u64);
        header.set_cksum();
        self.0.append(&header, content).unwrap();
        self
    }

    /// A file with a time that no file system keeps.
    fn late(mut self, name: &str, seconds: u64) -> Self {
        let mut header = Header::new_gnu();
        header.set_mtime(seconds);
        header.set_size(0);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        self.0.append_data(&mut header, name, &b""[..]).unwrap();
        self
    }

    fn dir(self, name: &str) -> Self {
        self.entry(EntryType::Directory, name, (0o755, 0), b"")
    }

    fn file(self, name: &str, content: &str) -> Self {
        self.entry(EntryType::Regular, name, (0o644, 0), content.as_bytes())
    }

    fn program(self, name: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, name, (0o755, 0), content)
    }

    fn link(self, name: &str, to: &str) -> Self {
        self.entry(EntryType::Symlink, name, (0o777, 0), to.as_bytes())
    }

    fn plain(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn gzip(self) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&self.plain()).unwrap();
        encoder.finish().unwrap()
    }
}

/// A shell, what it is linked with, and commands that the recipes call.
fn small_debian() -> Layer {
    let mut layer = Layer::new()
        .dir("etc/")
        .dir("usr/")
        .link("bin", "usr/bin")
        .dir("usr/bin/")
        .dir("usr/sbin/");
    layer = layer.program("usr/bin/sh", &fs::read("/bin/sh").unwrap());
    let linked = std::process::Command::new("ldd").arg("/bin/sh").output().unwrap();
    let linked = String::from_utf8(linked.stdout).unwrap();
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        layer = layer.program(library.trim_start_matches('/'), &fs::read(library).unwrap());
    }
    for tool in ["apt-get", "chmod", "chown", "find", "getent", "grep", "mkdir", "rm"] {
        layer = layer.program(&format!("usr/bin/{tool}"), b"#!/bin/sh\n");
    }
    // All packages are there.
    let layer = layer.program("usr/bin/dpkg-query", b"#!/bin/sh\necho installed\n");
    layer.dir("etc/sudoers.d/").dir("usr/share/doc/mica/")
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// An archive, as it grows.
struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn add(&mut self, name: &str, content: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        self.0.append_data(&mut header, name, content).unwrap();
    }

    /// Adds a blob, and gives its descriptor.
    fn blob(&mut self, kind: &str, content: &[u8]) -> Value {
        let hex = digest(content);
        self.add(&format!("blobs/sha256/{hex}"), content);
        let media = format!("application/vnd.oci.image.{kind}");
        json!({ "mediaType": media, "digest": format!("sha256:{hex}"), "size": content.len() })
    }

    fn manifest(&mut self, architecture: &str, layers: &[Vec<u8>]) -> Value {
        let config = json!({
            "os": "linux", "architecture": architecture,
            "config": { "Env": ["PATH=/opt/it's/bin:/usr/bin", "LANG=C.UTF-8"], "User": "nobody" },
        });
        let config = self.blob("config.v1+json", config.to_string().as_bytes());
        let layers: Vec<Value> =
            layers.iter().map(|layer| self.blob("layer.v1.tar", layer)).collect();
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": layers });
        let mut manifest = self.blob("manifest.v1+json", manifest.to_string().as_bytes());
        manifest["platform"] = json!({ "os": "linux", "architecture": architecture });
        manifest
    }

    fn write(mut self, place: &Place, manifests: &[Value]) -> PathBuf {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        self.add("index.json", index.to_string().as_bytes());
        self.add("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        self.end(place)
    }

    fn end(self, place: &Place) -> PathBuf {
        let path = place.path("image.tar");
        fs::write(&path, self.0.into_inner().unwrap()).unwrap();
        path
    }
}

/// An image of these layers and no other.
fn image(place: &Place, layers: &[Vec<u8>]) -> PathBuf {
    let mut archive = Archive::new();
    let manifest = archive.manifest("amd64", layers);
    archive.write(place, &[manifest])
}

/// What the build said; whether it went well is for the caller to see.
fn build(place: &Place, image: &Path) -> (bool, String) {
    let agent = place.path("agent");
    let words = ["build", "--name", "python-3-12", "--disk-mib", "256", "--image"];
    let words = [&words[..], &[image.to_str().unwrap(), "--guest-binary", agent.to_str().unwrap()]];
    let output = place.run(&words.concat());
    (output.status.success(), text(&output))
}

/// The root file system of a stage of the one build.
fn root(place: &Place, stage: &str) -> PathBuf {
    let stages = place.path("cache/templates/stages");
    let name = names(&stages).into_iter().find(|name| name.starts_with(stage)).unwrap();
    stages.join(name).join("root")
}

/// Who owns what, what may be done with it, and what is left out.
fn check_kinds(root: &Path) {
    let of = |name: &str| fs::symlink_metadata(root.join(name)).unwrap();
    assert_eq!(of("usr/bin/su").permissions().mode() & 0o7777, 0o4755);
    let owned = of("a/owned");
    assert_eq!(
        (owned.uid(), owned.gid(), owned.mode() & 0o777, owned.mtime()),
        (1234, 1234, 0o640, 1_000_000_000)
    );
    assert!(!root.join("dev/null").exists(), "a sandbox has its own");
    assert_eq!(fs::read_to_string(root.join("etc/hostname")).unwrap(), "mica\n");
}

#[test]
fn layers_lie_on_one_another_and_nothing_leads_out_of_them() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let outside = place.path("outside");
    fs::create_dir(&outside).unwrap();
    let below = small_debian()
        .dir("a/")
        .file("a/one", "1")
        .file("a/two", "2")
        .dir("a/sub/")
        .file("a/sub/deep", "d")
        .dir("gone/")
        .file("gone/low", "low")
        .dir("gone/kept/")
        .file("gone/kept/low", "low")
        .dir(&format!("{}/", outside.strip_prefix("/").unwrap().display()))
        .link("same", "/a")
        .link("out", outside.to_str().unwrap())
        .entry(EntryType::Regular, "usr/bin/su", (0o4755, 0), b"su")
        .entry(EntryType::Regular, "a/owned", (0o640, 1234), b"o")
        .entry(EntryType::Link, "a/again", (0o644, 0), b"a/two")
        .entry(EntryType::Char, "dev/null", (0o666, 0), b"")
        .late("late", u64::MAX)
        .file("kind", "a file")
        .link("etc/resolv.conf", outside.join("resolv.conf").to_str().unwrap())
        .link("etc/mica", outside.to_str().unwrap());
    let above = Layer::new()
        .file("a/.wh.one", "")
        .file("same/three", "3")
        .file("out/file", "kept inside")
        .dir("gone/kept/")
        .file("gone/kept/high", "high")
        .file("gone/.wh..wh..opq", "")
        .file("a/.wh.sub", "")
        .file("./a/two", "2b")
        .dir("kind/")
        .file("kind/inner", "i");
    let (built, said) = build(&place, &image(&place, &[below.plain(), above.gzip()]));
    assert!(built, "{said}");
    assert!(
        said.contains("layer 2 of 2") && said.contains("template `python-3-12` is ready"),
        "{said}"
    );

    let root = root(&place, "image-");
    let read = |name: &str| fs::read_to_string(root.join(name)).ok();
    assert_eq!((read("a/one"), read("a/three").as_deref()), (None, Some("3")));
    assert_eq!((read("a/two").as_deref(), read("a/again").as_deref()), (Some("2b"), Some("2")));
    assert!(!root.join("a/sub").exists());
    let gone = (read("gone/low"), read("gone/kept/low"), read("gone/kept/high"));
    assert_eq!(gone, (None, None, Some("high".to_owned())));
    assert_eq!(read("kind/inner").as_deref(), Some("i"));
    // A link to the machine's files is one to the image's own.
    assert_eq!(names(&outside), [""; 0]);
    let inside = root.join(outside.strip_prefix("/").unwrap()).join("file");
    assert_eq!(fs::read_to_string(inside).unwrap(), "kept inside");
    assert_eq!(fs::read_link(root.join("bin")).unwrap(), Path::new("usr/bin"));
    check_kinds(&root);

    // What the image's programs find in their environment, those of a sandbox do.
    // They lie where a link of the image's leads to, within it.
    let settings = self::root(&place, "rootfs-").join(outside.strip_prefix("/").unwrap());
    let settings = settings.join("template.json");
    let settings: Value = serde_json::from_slice(&fs::read(settings).unwrap()).unwrap();
    assert_eq!(settings["env"], json!({ "PATH": "/opt/it's/bin:/usr/bin", "LANG": "C.UTF-8" }));
    assert_eq!(settings["default_user"], "user");
    let profile = read("etc/profile.d/00-image-path.sh");
    assert_eq!(profile.as_deref(), Some("export PATH='/opt/it'\\''s/bin:/usr/bin'\n"));

    // From the cache the second time; a changed agent changes nothing of it.
    let mut agent = static_program();
    agent.push(1);
    fs::write(place.path("agent"), agent).unwrap();
    let (built, said) = build(&place, &place.path("image.tar"));
    assert!(built && said.contains("image] unchanged, taken from the cache"), "{said}");
}

#[test]
fn the_image_for_this_kind_of_machine_is_chosen() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let mut archive = Archive::new();
    let foreign = archive.manifest("arm64", &[Layer::new().plain()]);
    let ours = archive.manifest("amd64", &[small_debian().file("ours", "x").gzip()]);
    let mut attestation = archive.manifest("unknown", &[]);
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    let index = json!({ "manifests": [foreign, ours, attestation] }).to_string();
    let index = archive.blob("index.v1+json", index.as_bytes());
    let (built, said) = build(&place, &archive.write(&place, &[index]));
    assert!(built, "{said}");
    assert!(root(&place, "image-").join("ours").exists());
}

#[test]
fn the_older_form_of_docker_save_is_read() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let mut archive = Archive::new();
    archive.add("c.json", br#"{"os":"linux","architecture":"amd64","config":{"Env":null}}"#);
    archive.add("1/layer.tar", &small_debian().file("old", "x").plain());
    // The same layer once more.
    let mut link = Header::new_gnu();
    link.set_entry_type(EntryType::Symlink);
    link.set_size(0);
    archive.0.append_link(&mut link, "2/layer.tar", "../1/layer.tar").unwrap();
    let layers = ["1/layer.tar", "2/layer.tar"];
    let saved = json!([{ "Config": "c.json", "RepoTags": ["a:b"], "Layers": layers }]);
    archive.add("manifest.json", saved.to_string().as_bytes());
    let (built, said) = build(&place, &archive.end(&place));
    assert!(built, "{said}");
    assert!(root(&place, "image-").join("old").exists());
    // There are root's programs in it.
    let mode = fs::metadata(place.path("cache/templates")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn an_image_that_is_none_is_refused_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let of = |layer: Layer| image(&place, &[small_debian().plain(), layer.plain()]);
    let refused = |path: &Path, why: &str| {
        let (built, said) = build(&place, path);
        assert!(!built && said.contains(why), "{why}: {said}");
        place.assert_nothing_left();
    };
    refused(&place.path("nowhere.tar"), "could not read");
    fs::write(place.path("image.tar"), "no archive").unwrap();
    refused(&place.path("image.tar"), "could not read the archive");
    refused(&of(Layer::new().file("../../evil", "x")), "`../../evil` steps out");
    refused(&of(Layer::new().file("a/.wh...", "")), "a directory itself is gone");
    refused(
        &of(Layer::new().link("a", "/var").file("a/c", "x")),
        "`/a/c`: `/a` is a link that leads nowhere",
    );
    let zstd = image(&place, &[vec![0x28, 0xb5, 0x2f, 0xfd, 0]]);
    refused(&zstd, "compressed with zstd");
    let mut two = Archive::new();
    let manifests = [two.manifest("amd64", &[]), two.manifest("amd64", &[Layer::new().plain()])];
    refused(&two.write(&place, &manifests), "2 images for linux/amd64");
    let mut foreign = Archive::new();
    let manifest = foreign.manifest("arm64", &[]);
    refused(&foreign.write(&place, &[manifest]), "no image for linux/amd64");
    let mut damaged = Archive::new();
    let mut manifest = damaged.blob("manifest.v1+json", b"{}");
    damaged.add(&format!("blobs/sha256/{}", "0".repeat(64)), b"x");
    manifest["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
    refused(&damaged.write(&place, &[manifest]), "is damaged");
    let mut missing = Archive::new();
    missing.add("oci-layout", b"{}");
    refused(&missing.end(&place), "neither index.json nor manifest.json");
    let output = place.run(&["build", "--name", "x", "--image", "i.tar", "--preset", "base"]);
    assert!(text(&output).contains("cannot be used with"), "{}", text(&output));
}

#[test]
fn an_image_without_apt_is_refused_by_its_name() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let layers = [small_debian().plain(), Layer::new().file("usr/bin/.wh.apt-get", "").plain()];
    let (built, said) = build(&place, &image(&place, &layers));
    assert!(!built && said.contains("the image has no apt-get"), "{said}");
    place.assert_nothing_left();
}
