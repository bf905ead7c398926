//! What is on the device, and what is only in memory.
//!
//! Called by `simulation` with each step that happened. Refuses paths outside its root.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Random;
use crate::crashsafe::Effect;

type Id = usize;

#[derive(Clone, Debug)]
enum Node {
    Dir(Id),
    File(Id),
    Symlink(String),
}

/// A change of names that happens whole or not at all.
type Naming = Vec<(String, Option<Node>)>;

#[derive(Debug, Default)]
struct Dir {
    now: BTreeMap<String, Node>,
    durable: BTreeMap<String, Node>,
    pending: Vec<Naming>,
}

#[derive(Debug)]
enum Change {
    Bytes(usize, Vec<u8>),
    Len(usize),
}

#[derive(Debug, Default)]
struct Content {
    durable: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Debug)]
pub(super) struct Model {
    root: PathBuf,
    dirs: Vec<Dir>,
    files: Vec<Content>,
    /// Which of our files an inode is. A number that is used again is replaced when it is.
    inodes: HashMap<u64, Id>,
}

impl Dir {
    fn change(&mut self, naming: Naming) {
        apply(&mut self.now, &naming);
        self.pending.push(naming);
    }
}

fn apply(names: &mut BTreeMap<String, Node>, naming: &Naming) {
    for (name, node) in naming {
        match node {
            Some(node) => drop(names.insert(name.clone(), node.clone())),
            None => drop(names.remove(name)),
        }
    }
}

/// `Vec::resize`, which is slow without optimisation.
fn set_len(content: &mut Vec<u8>, len: usize) {
    let kept = content.len().min(len);
    let mut other = vec![0; len];
    other[..kept].copy_from_slice(&content[..kept]);
    *content = other;
}

impl Content {
    fn keep(content: &mut Vec<u8>, change: &Change) {
        match change {
            Change::Len(len) => set_len(content, *len),
            Change::Bytes(at, bytes) => Self::put(content, *at, bytes),
        }
    }

    fn put(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        if content.len() < end {
            set_len(content, end);
        }
        content[at..end].copy_from_slice(bytes);
    }

    /// What a stop leaves of it.
    fn after_stop(&self, random: &mut Random) -> Vec<u8> {
        let mut content = self.durable.clone();
        for change in &self.pending {
            match change {
                Change::Bytes(at, bytes) => {
                    for (page, part) in bytes.chunks(4096).enumerate() {
                        if random.coin() {
                            Self::put(&mut content, at + page * 4096, part);
                        }
                    }
                }
                Change::Len(_) if random.coin() => Self::keep(&mut content, change),
                Change::Len(_) => {}
            }
        }
        content
    }
}

impl Model {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, dirs: vec![Dir::default()], files: Vec::new(), inodes: HashMap::new() }
    }

    /// The directory that has the path's last component, and that component.
    fn find<'a>(&self, path: &'a Path) -> io::Result<(Id, &'a str)> {
        let outside = || io::Error::other(format!("{} is not in the model", path.display()));
        let inside = path.strip_prefix(&self.root).map_err(|_| outside())?;
        let mut parts: Vec<&str> = inside.iter().filter_map(|part| part.to_str()).collect();
        let name = parts.pop().ok_or_else(outside)?;
        let mut dir = 0;
        for part in parts {
            match self.dirs[dir].now.get(part) {
                Some(Node::Dir(id)) => dir = *id,
                _ => return Err(outside()),
            }
        }
        Ok((dir, name))
    }

    fn file(&mut self, file: &File) -> io::Result<&mut Content> {
        let inode = file.metadata()?.ino();
        let unknown = || io::Error::other("a file that was not made through the seam");
        let id = self.inodes.get(&inode).copied().ok_or_else(unknown)?;
        Ok(&mut self.files[id])
    }

    fn name(&mut self, path: &Path, node: Option<Node>) -> io::Result<()> {
        let (dir, name) = self.find(path)?;
        self.dirs[dir].change(vec![(name.to_owned(), node)]);
        Ok(())
    }

    /// Notes what happened.
    pub(super) fn apply(&mut self, effect: &Effect<'_>) -> io::Result<()> {
        match effect {
            Effect::MakeDir(path) => {
                self.dirs.push(Dir::default());
                self.name(path, Some(Node::Dir(self.dirs.len() - 1)))
            }
            Effect::Create(path) => {
                self.files.push(Content::default());
                let id = self.files.len() - 1;
                self.inodes.insert(fs::metadata(path)?.ino(), id);
                self.name(path, Some(Node::File(id)))
            }
            Effect::Symlink(path, target) => {
                self.name(path, Some(Node::Symlink((*target).to_owned())))
            }
            Effect::Link(file, path) => {
                let unknown = || io::Error::other("a link to a file from elsewhere");
                let inode = file.metadata()?.ino();
                let id = self.inodes.get(&inode).copied().ok_or_else(unknown)?;
                self.name(path, Some(Node::File(id)))
            }
            Effect::Rename(from, to) => {
                let ((dir, from), (to_dir, to)) = (self.find(from)?, self.find(to)?);
                assert_eq!(dir, to_dir, "a rename across directories is not in the fault model");
                let node = self.dirs[dir].now.get(from).cloned();
                let gone = (from.to_owned(), None);
                self.dirs[dir].change(vec![gone, (to.to_owned(), node)]);
                Ok(())
            }
            Effect::Remove(path) => self.name(path, None),
            Effect::Write(file, offset, bytes) => {
                let at = usize::try_from(*offset).unwrap();
                self.file(file)?.pending.push(Change::Bytes(at, bytes.to_vec()));
                Ok(())
            }
            Effect::SetLen(file, bytes) => {
                let len = usize::try_from(*bytes).unwrap();
                self.file(file)?.pending.push(Change::Len(len));
                Ok(())
            }
            Effect::Clone(from, to) => {
                let len = usize::try_from(from.metadata()?.len()).unwrap();
                let mut content = vec![0; len];
                from.read_exact_at(&mut content, 0)?;
                self.file(to)?.pending.extend([Change::Len(len), Change::Bytes(0, content)]);
                Ok(())
            }
            Effect::SyncFile(file) => {
                let file = self.file(file)?;
                for change in file.pending.drain(..) {
                    Content::keep(&mut file.durable, &change);
                }
                Ok(())
            }
            Effect::SyncDir(path) => {
                let dir = if *path == self.root { 0 } else { self.dir(path)? };
                let dir = &mut self.dirs[dir];
                dir.pending.clear();
                dir.durable.clone_from(&dir.now);
                Ok(())
            }
        }
    }

    fn dir(&self, path: &Path) -> io::Result<Id> {
        let (dir, name) = self.find(path)?;
        match self.dirs[dir].now.get(name) {
            Some(Node::Dir(id)) => Ok(*id),
            _ => Err(io::Error::other(format!("{} is not a directory", path.display()))),
        }
    }

    /// Decides what a sync that failed leaves, for good.
    pub(super) fn fail_sync(&mut self, file: &File, random: &mut Random) -> io::Result<()> {
        let file = self.file(file)?;
        file.durable = file.after_stop(random);
        file.pending.clear();
        Ok(())
    }

    /// Makes the tree that a stop leaves.
    pub(super) fn lay_out(&self, into: &Path, random: &mut Random) -> io::Result<()> {
        let mut made = HashMap::new();
        self.lay_out_dir(0, into, random, &mut made)
    }

    fn lay_out_dir(
        &self,
        dir: Id,
        into: &Path,
        random: &mut Random,
        made: &mut HashMap<Id, PathBuf>,
    ) -> io::Result<()> {
        let mut names = self.dirs[dir].durable.clone();
        for naming in &self.dirs[dir].pending {
            if random.coin() {
                apply(&mut names, naming);
            }
        }
        for (name, node) in names {
            let path = into.join(name);
            match node {
                Node::Symlink(target) => std::os::unix::fs::symlink(target, path)?,
                Node::Dir(id) => {
                    fs::create_dir(&path)?;
                    self.lay_out_dir(id, &path, random, made)?;
                }
                Node::File(id) => {
                    if let Some(first) = made.get(&id) {
                        fs::hard_link(first, &path)?;
                    } else {
                        fs::write(&path, self.files[id].after_stop(random))?;
                        made.insert(id, path);
                    }
                }
            }
        }
        Ok(())
    }
}
