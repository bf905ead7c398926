//! Archives carry a template whole, or not at all.

use std::io::Cursor;

use super::*;
use crate::manifest::tests::sample;
use crate::testing::{TempDir, names_in, put, spec};

const MIB: u64 = 1 << 20;

/// A store with a template whose disk has data here and there.
fn source() -> (TempDir, Template) {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let spec = spec("carried", 5);
    let staging = store.stage(&spec.name, false).unwrap();
    staging.create_part(Part::Kernel).unwrap().write_all(&[1; 5000]).unwrap();
    staging.create_part(Part::Initramfs).unwrap().write_all(&[2; 777]).unwrap();
    let disk = staging.create_part(Part::Disk).unwrap();
    disk.set_len(64 * MIB + 512).unwrap();
    disk.write_all_at(&[3; 70_000], 5).unwrap();
    // Longer than one entry may be.
    disk.write_all_at(&vec![4; 20 << 20], 20 * MIB).unwrap();
    // Written, and still nothing but zeros.
    disk.write_all_at(&[0; 200_000], 50 * MIB).unwrap();
    disk.write_all_at(&[6; 512], 64 * MIB).unwrap();
    let template = staging.commit(&spec).unwrap();
    (dir, template)
}

fn archive(template: &Template) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_archive(template, &mut bytes).unwrap();
    bytes
}

fn import(bytes: &[u8]) -> (TempDir, Result<Imported>) {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let result = store.import(Cursor::new(bytes), OnExisting::Keep);
    (dir, result)
}

fn content(file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = file;
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_template_arrives_as_it_left_and_holes_take_no_room() {
    let (_dir, template) = source();
    let bytes = archive(&template);
    assert!(bytes.len() < 22 << 20, "{} bytes for 21 MiB of data", bytes.len());
    let (_dir, result) = import(&bytes);
    let Imported::Stored(copy) = result.unwrap() else { panic!("it is new there") };
    assert!(copy.manifest().same_content(template.manifest()));
    assert_ne!(copy.manifest().id, template.manifest().id);
    let pairs = [
        (copy.open_kernel().unwrap(), template.open_kernel().unwrap()),
        (copy.open_initramfs().unwrap().unwrap(), template.open_initramfs().unwrap().unwrap()),
        (copy.open_disk().unwrap().unwrap(), template.open_disk().unwrap().unwrap()),
    ];
    for (arrived, left) in pairs {
        assert!(content(arrived) == content(left));
    }
    let disk = copy.open_disk().unwrap().unwrap().metadata().unwrap();
    assert!(std::os::unix::fs::MetadataExt::blocks(&disk) * 512 < 24 * MIB);
}

#[test]
fn padding_after_the_archive_is_not_looked_at() {
    let (_dir, template) = source();
    for padding in [vec![0; 100_000], vec![0xaa; 4096], vec![0; 7]] {
        let mut bytes = archive(&template);
        bytes.extend_from_slice(&padding);
        let (_dir, result) = import(&bytes);
        assert!(matches!(result, Ok(Imported::Stored(_))), "{result:?}");
    }
}

#[test]
fn the_same_again_is_up_to_date_and_another_is_refused() {
    let (_dir, template) = source();
    let bytes = archive(&template);
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let import = |on| store.import(Cursor::new(&bytes), on);
    assert!(matches!(import(OnExisting::Keep), Ok(Imported::Stored(_))));
    assert!(matches!(import(OnExisting::Keep), Ok(Imported::UpToDate(_))));
    assert!(matches!(import(OnExisting::Replace), Ok(Imported::Stored(_))));
    put(&store, "carried", 9, true).unwrap();
    let error = import(OnExisting::Keep).unwrap_err();
    assert!(matches!(error, StorageError::TemplateExists { .. }), "{error}");
    assert!(matches!(import(OnExisting::Replace), Ok(Imported::Stored(_))));
    assert_eq!(names_in(&dir.join("templates")).len(), 1);
}

#[test]
fn cut_off_anywhere_it_is_refused_and_leaves_nothing() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let bytes = archive(&put(&store, "small", 3, false).unwrap());
    // The end of the archive proper: the `end` entry's header.
    let whole = bytes.len() - 1024;
    for len in (0..whole).step_by(100).chain([whole - 1, whole - 512]) {
        let (dir, result) = import(&bytes[..len]);
        let error = result.unwrap_err();
        let right = matches!(error, StorageError::Archive(_) | StorageError::Io { .. });
        assert!(right, "{len}: {error:?}");
        assert!(names_in(&dir.join("templates")).is_empty(), "{len}");
        assert!(names_in(&dir.join("names")).is_empty(), "{len}");
    }
}

#[test]
fn changed_bytes_are_found() {
    let dir = TempDir::new();
    let store = Store::open(dir.path()).unwrap();
    let bytes = archive(&put(&store, "small", 3, false).unwrap());
    let (mut taken, end) = (0, bytes.len() - 1024);
    for at in (0..end).step_by(37) {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        let (dir, result) = import(&bad);
        match result {
            Err(_) => assert!(names_in(&dir.join("templates")).is_empty(), "{at}"),
            // The padding of an entry is not content.
            Ok(Imported::Stored(template)) => {
                taken += 1;
                assert_eq!(content(template.open_kernel().unwrap()), [3; 4096]);
            }
            Ok(other) => panic!("{other:?}"),
        }
    }
    assert!(taken < 10, "{taken} changes went unseen");
}

/// An archive of the given entries, with a right manifest first.
fn forged(manifest: &Manifest, entries: &[(&str, u64, tar::EntryType)]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, content: &[u8], size: u64, kind: tar::EntryType| {
        let mut header = tar::Header::new_ustar();
        // Set by hand: the library would refuse `..` itself.
        let field = &mut header.as_old_mut().name;
        field[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(size);
        header.set_entry_type(kind);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append(&header, content).unwrap();
    };
    let bytes = manifest.encode().unwrap();
    add("manifest", &bytes, bytes.len() as u64, tar::EntryType::Regular);
    for (name, size, kind) in entries {
        let content = vec![1; usize::try_from(*size).unwrap()];
        add(name, &content, *size, *kind);
    }
    tar.into_inner().unwrap()
}

#[test]
fn forged_archives_are_refused() {
    use tar::EntryType::{Directory, Regular, Symlink};
    let info = |bytes| PartInfo { bytes, crc32c: 0 };
    let manifest =
        Manifest { kernel: info(10), initramfs: None, disk: Some(info(16 << 20)), ..sample() };
    let kernel = ("kernel", 10, Regular);
    let disk = |offset: &'static str| (offset, 512, Regular);
    let end = ("end", 0, Regular);
    let cases: Vec<Vec<(&str, u64, tar::EntryType)>> = vec![
        vec![],
        vec![end],
        vec![("kernel", 11, Regular), end],
        vec![("kernel", 10, Symlink), end],
        vec![("../kernel", 10, Regular), end],
        vec![kernel],
        vec![kernel, ("initramfs", 10, Regular), end],
        vec![kernel, ("disk", 512, Directory), end],
        vec![kernel, disk("disk/../../../etc/passwd"), end],
        vec![kernel, disk("/etc/passwd"), end],
        vec![kernel, disk("disk/0"), end],
        vec![kernel, disk("disk/00000000000FFFFF"), end],
        vec![kernel, disk("disk/ffffffffffffffff"), end],
        vec![kernel, disk("disk/0000000001000000"), end],
        vec![kernel, disk("disk/0000000000010000"), disk("disk/0000000000010000"), end],
        vec![kernel, disk("disk/0000000000020000"), disk("disk/0000000000010000"), end],
        vec![kernel, ("disk/0000000000000000", (8 << 20) + 512, Regular), end],
        // All in form, but not what the manifest's checksums say.
        vec![kernel, disk("disk/0000000000010000"), end],
    ];
    for entries in cases {
        let (dir, result) = import(&forged(&manifest, &entries));
        let error = result.expect_err(&format!("{entries:?}"));
        assert!(
            matches!(error, StorageError::Archive(_) | StorageError::Part { .. }),
            "{entries:?}: {error:?}"
        );
        assert!(names_in(&dir.join("templates")).is_empty(), "{entries:?}");
    }
    for rubbish in [vec![], vec![0; 10_240], vec![0xff; 10_240], b"not a tar at all".to_vec()] {
        assert!(import(&rubbish).1.is_err());
    }
}

#[test]
fn a_reader_that_closes_is_an_error_and_not_a_panic() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (_dir, template) = source();
    assert!(matches!(write_archive(&template, Closed), Err(StorageError::Io { .. })));
}
