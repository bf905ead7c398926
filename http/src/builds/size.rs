//! The size that a build asks for: what is none, and when its base has to boot for it.
//!
//! Called by [`super`] when a build is announced, and by [`super::base`] when it is known what it starts from.
//! Refuses more than a guest may have, and disks larger than any here: a build's disk is its base's.

use mica_shards::TemplateInfo;
use mica_units::{Mebibytes, VCPUS_MAX, VcpuCount};

use super::steps::StepError;
use super::wish::Announced;
use crate::error::ApiError;

/// Memory that a guest is booted with at least, in MiB: with less a stock kernel does not come up.
const MEMORY_MIB_MIN: u32 = 128;

/// vCPUs and MiB of memory, as far as the client minds.
pub type Asked = (Option<u32>, Option<u32>);

/// Checks what an announcement asks for, as far as that can be said without its base. `templates` are the
/// operator's.
///
/// # Errors
/// 400, saying what to change.
pub fn check(
    wanted: &Announced,
    templates: &[TemplateInfo],
    limit_mib: u32,
) -> Result<(), ApiError> {
    if let Some(count) = wanted.vcpus.filter(|count| VcpuCount::new(*count).is_err()) {
        return Err(ApiError::bad_request(format!(
            "`cpuCount` is {count}; ask for 1 to {VCPUS_MAX}"
        )));
    }
    let most = most_memory(templates, limit_mib);
    if let Some(memory) = wanted.memory_mib.filter(|memory| !(1..=most).contains(memory)) {
        return Err(ApiError::bad_request(format!(
            "`memoryMB` is {memory}; ask for {MEMORY_MIB_MIN} to {most}"
        )));
    }
    let largest = templates.iter().map(|template| template.disk.count()).max().unwrap_or_default();
    if let Some(free) = wanted.free_disk_mib.filter(|free| *free > largest) {
        return Err(ApiError::bad_request(format!(
            "`minFreeDiskMb` is {free}, and the largest disk of this host's templates has {largest} MiB: a \
             build has the disk of its base. Ask for less, or have the operator make a template with a larger \
             `--disk-mib` and build on that"
        )));
    }
    Ok(())
}

/// Memory that a build may ask for, in MiB: what the operator said, or what the largest of the operator's
/// templates has.
pub fn most_memory(templates: &[TemplateInfo], limit_mib: u32) -> u32 {
    let largest = templates.iter().map(|template| template.memory.count()).max();
    largest.unwrap_or_default().max(limit_mib)
}

/// Whether what has this size is what was asked for.
pub fn fits(asked: Asked, (vcpus, memory_mib): (u32, u32)) -> bool {
    asked.0.is_none_or(|wanted| wanted == vcpus)
        && asked.1.is_none_or(|wanted| wanted == memory_mib)
}

/// The size that was asked for, of something that has this one.
pub fn completed(asked: Asked, has: (u32, u32)) -> (u32, u32) {
    (asked.0.unwrap_or(has.0), asked.1.unwrap_or(has.1))
}

/// The size in which a base of size `has` is to boot. `None`: it has that size.
///
/// # Errors
/// [`StepError`], when no guest can have it.
pub fn to_boot_in(
    asked: Asked,
    has: (u32, u32),
    most_mib: u32,
) -> Result<Option<(VcpuCount, Mebibytes)>, StepError> {
    if fits(asked, has) {
        return Ok(None);
    }
    let (vcpus, memory_mib) = completed(asked, has);
    if memory_mib < MEMORY_MIB_MIN {
        return Err(StepError(format!(
            "a guest does not boot in {memory_mib} MiB; ask for a memoryMB of {MEMORY_MIB_MIN} or more, or of \
             the base's {}",
            has.1
        )));
    }
    // A build may have been announced when more was allowed.
    if memory_mib > most_mib {
        return Err(StepError(format!(
            "a build here has at most {most_mib} MiB of memory, and {memory_mib} were asked for"
        )));
    }
    let vcpus = VcpuCount::new(vcpus)
        .map_err(|error| StepError(format!("{error}; ask for another cpuCount")))?;
    Ok(Some((vcpus, Mebibytes::new(memory_mib))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    fn template(memory_mib: u32, disk_mib: u32) -> TemplateInfo {
        TemplateInfo {
            id: String::new(),
            name: "base".parse().unwrap(),
            vcpus: VcpuCount::new(2).unwrap(),
            memory: Mebibytes::new(memory_mib),
            disk: Mebibytes::new(disk_mib),
            envd_version: String::new(),
            created_at: UNIX_EPOCH,
            spawn_count: 0,
            last_spawned_at: None,
            build_count: 1,
            public: true,
            build_id: None,
        }
    }

    #[test]
    fn what_no_guest_has_is_refused_before_anything_runs() {
        let said = |(vcpus, memory_mib): Asked, free_disk_mib, templates: &[TemplateInfo]| {
            let (name, tags) = ("app".to_owned(), Vec::new());
            let wanted = Announced { name, tags, vcpus, memory_mib, free_disk_mib };
            check(&wanted, templates, 8192).err().map(|error| error.message())
        };
        let small = [template(1024, 4096)];
        let fine = [(None, None), (Some(8), Some(8192)), (Some(1), Some(16))];
        for asked in fine {
            assert_eq!(said(asked, Some(4096), &small), None);
        }
        for count in [0, 9] {
            assert!(said((Some(count), None), None, &small).unwrap().contains("1 to 8"));
        }
        for memory in [0, 8193] {
            assert!(said((None, Some(memory)), None, &small).unwrap().contains("128 to 8192"));
        }
        assert_eq!(said((None, Some(16384)), None, &[template(16384, 0)]), None, "as it is there");
        assert!(said((None, None), Some(4097), &small).unwrap().contains("--disk-mib"));
    }

    #[test]
    fn only_another_size_is_booted() {
        let has = (2, 512);
        for same in [(None, None), (Some(2), Some(512)), (None, Some(512))] {
            assert_eq!(to_boot_in(same, has, 2048), Ok(None));
        }
        let size =
            |vcpus, memory| Ok(Some((VcpuCount::new(vcpus).unwrap(), Mebibytes::new(memory))));
        assert_eq!(to_boot_in((Some(1), None), has, 2048), size(1, 512));
        assert_eq!(to_boot_in((None, Some(1024)), has, 2048), size(2, 1024));
        assert!(to_boot_in((None, Some(127)), has, 2048).unwrap_err().0.contains("128"));
        assert!(to_boot_in((Some(9), None), has, 2048).unwrap_err().0.contains("cpuCount"));
    }
}
