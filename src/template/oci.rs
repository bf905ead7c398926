//! Container images in an archive: what `docker save`, `podman save` or `skopeo copy … oci-archive:` wrote.
//!
//! Called by the build, which makes a root file system of one. Reads the OCI image layout (image-layout.md of the
//! OCI image specification, version 1) and the older form of `docker save` (manifest.json). Refuses an image that is not
//! for x86-64 Linux, a blob that is not what its digest says, and layers that are compressed with anything but gzip.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::cache::{Cache, Key, WorkDir};
use super::runner::Runner;

/// The largest of the JSON documents: a manifest has a few hundred bytes for each layer.
const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// Indexes that lead to a manifest: an index of platforms within the one of the archive, as buildx writes it.
const INDEX_DEPTH_MAX: usize = 3;
const GZIP: [u8; 2] = [0x1f, 0x8b];
const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// An image whose blobs lie in a directory of their own, which goes with it.
#[derive(Debug)]
pub struct Image {
    dir: WorkDir,
    layers: Vec<PathBuf>,
    /// What its processes find in their environment.
    pub env: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

/// One image of manifest.json. Its names are paths within the archive.
#[derive(Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: PathBuf,
    #[serde(rename = "Layers")]
    layers: Vec<PathBuf>,
}

#[derive(Deserialize)]
struct Configuration {
    os: String,
    architecture: String,
    #[serde(default)]
    config: Settings,
}

#[derive(Default, Deserialize)]
struct Settings {
    #[serde(rename = "Env", default)]
    env: Option<Vec<String>>,
}

impl Image {
    /// Reads the archive at `path`.
    ///
    /// # Errors
    /// When it is not such an archive, holds several images, or is damaged.
    pub fn open(runner: &Runner, cache: &Cache, path: &Path) -> Result<Self> {
        let dir = cache.work_dir()?;
        unpack(runner, path, dir.path())
            .with_context(|| format!("could not read the archive {}", path.display()))?;
        let (config, layers) = find(dir.path())
            .with_context(|| format!("{} is no image that can be used", path.display()))?;
        let Configuration { os, architecture, config } = document(&config)?;
        if (os.as_str(), architecture.as_str()) != ("linux", "amd64") {
            bail!("the image is for {os}/{architecture}; save the one for linux/amd64");
        }
        let env = config.env.unwrap_or_default();
        let env = env.iter().filter_map(|line| line.split_once('='));
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        Ok(Self { dir, layers, env })
    }

    /// How many layers it has.
    pub fn count(&self) -> usize {
        self.layers.len()
    }

    /// Its layers as streams of tar, the lowest first.
    pub fn layers(&self) -> impl Iterator<Item = Result<Box<dyn Read>>> {
        self.layers.iter().map(|path| {
            let name = path.strip_prefix(self.dir.path()).unwrap_or(path).display().to_string();
            layer(path).with_context(|| format!("could not read the layer {name}"))
        })
    }
}

/// A layer's stream, whatever its media type calls it: the first bytes cannot be wrong about it.
fn layer(path: &Path) -> Result<Box<dyn Read>> {
    let mut head = Vec::new();
    File::open(path)?.take(4).read_to_end(&mut head)?;
    let file = BufReader::with_capacity(1 << 20, File::open(path)?);
    if head.starts_with(&GZIP) {
        return Ok(Box::new(MultiGzDecoder::new(file)));
    }
    if head.starts_with(&ZSTD) {
        bail!(
            "it is compressed with zstd; save the image with gzip, or with none (`skopeo copy --dest-compress-format gzip`)"
        );
    }
    Ok(Box::new(file))
}

/// Takes the plain files out of the archive, and the links of its older form: a layer that is the same as
/// another is a link to that one's file.
fn unpack(runner: &Runner, archive: &Path, into: &Path) -> Result<()> {
    let file = BufReader::with_capacity(1 << 20, File::open(archive)?);
    let mut links = Vec::new();
    for entry in tar::Archive::new(file).entries()? {
        runner.check()?;
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let kind = entry.header().entry_type();
        if !kind.is_file() && !kind.is_symlink() {
            continue;
        }
        let name = within(&path)?;
        let target = into.join(&name);
        if kind.is_symlink() {
            let to = entry.link_name()?.unwrap_or_default().into_owned();
            links.push((target, into.join(beside(&name, &to)?)));
            continue;
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        std::io::copy(&mut entry, &mut File::create(&target)?)?;
    }
    for (link, to) in links {
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::hard_link(&to, &link).with_context(|| format!("the link {}", link.display()))?;
    }
    Ok(())
}

/// What a link at `name` leads to, by names alone. Refuses one that steps out of the archive.
fn beside(name: &Path, to: &Path) -> Result<PathBuf> {
    let mut path = name.parent().unwrap_or(Path::new("")).to_path_buf();
    for part in to.components() {
        match part {
            Component::ParentDir if path.pop() => {}
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            _ => bail!("`{}` leads out of where it belongs", to.display()),
        }
    }
    Ok(path)
}

/// A name of the archive without what may stand before it. Refuses one that steps out.
pub fn within(path: &Path) -> Result<PathBuf> {
    let mut kept = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => kept.push(name),
            Component::CurDir | Component::RootDir => {}
            _ => bail!("`{}` steps out of where it belongs", path.display()),
        }
    }
    Ok(kept)
}

/// The files of the configuration and of the layers.
fn find(dir: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    if dir.join("index.json").exists() {
        return find_in_layout(dir);
    }
    let saved = dir.join("manifest.json");
    if !saved.exists() {
        bail!(
            "it has neither index.json nor manifest.json; make it with `docker save` or `skopeo copy docker://… oci-archive:FILE`"
        );
    }
    let saved: Vec<Saved> = document(&saved)?;
    let [Saved { config, layers }] = &saved[..] else {
        bail!("it holds {} images; save one", saved.len());
    };
    let file = |path: &PathBuf| Ok(dir.join(within(path)?));
    Ok((file(config)?, layers.iter().map(file).collect::<Result<_>>()?))
}

fn find_in_layout(dir: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let mut index: Index = document(&dir.join("index.json"))?;
    for _ in 0..INDEX_DEPTH_MAX {
        let chosen = for_us(&index)?;
        let file = blob(dir, chosen)?;
        if chosen.media_type.contains("index") || chosen.media_type.contains("manifest.list") {
            index = document(&file)?;
            continue;
        }
        let manifest: Manifest = document(&file)?;
        let layers = manifest.layers.iter().map(|layer| blob(dir, layer));
        return Ok((blob(dir, &manifest.config)?, layers.collect::<Result<_>>()?));
    }
    bail!("its indexes lie more than {INDEX_DEPTH_MAX} deep")
}

/// The image for this kind of machine. Attestations beside it are for no platform that is.
fn for_us(index: &Index) -> Result<&Descriptor> {
    let is_ours = |one: &&Descriptor| {
        let is_known = |of: &Platform| of.os != "unknown";
        one.platform.as_ref().is_none_or(|of| {
            is_known(of) && (of.os.as_str(), of.architecture.as_str()) == ("linux", "amd64")
        })
    };
    let mut ours: Vec<&Descriptor> = index.manifests.iter().filter(is_ours).collect();
    // One image may have several tags.
    ours.dedup_by_key(|one| &one.digest);
    match ours[..] {
        [one] => Ok(one),
        [] => bail!("it has no image for linux/amd64"),
        _ => bail!("it holds {} images for linux/amd64; save one", ours.len()),
    }
}

/// The file of a blob, whose content is what its digest says.
fn blob(dir: &Path, descriptor: &Descriptor) -> Result<PathBuf> {
    let digest = &descriptor.digest;
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        bail!("`{digest}` is no sha256 digest");
    }
    let file = dir.join("blobs/sha256").join(hex);
    if !file.exists() {
        bail!(
            "the blob {digest} is not in it: it is not whole, or refers to what stayed in the registry"
        );
    }
    if Key::of_file(&file)?.as_str() != hex {
        bail!("the blob {digest} is damaged");
    }
    Ok(file)
}

fn document<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let name = path.file_name().unwrap_or_default().display();
    let read = || -> Result<T> {
        let mut text = String::new();
        File::open(path)?.take(DOCUMENT_BYTES_MAX).read_to_string(&mut text)?;
        Ok(serde_json::from_str(&text)?)
    };
    read().with_context(|| format!("could not read {name} of the image"))
}
