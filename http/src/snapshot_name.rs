//! What snapshots are called: which names a client may give, how they are listed, and what stands for one.
//!
//! Used by the API, and where a create looks for what it is to start from. Refuses names in another tenant's
//! namespace, and what reads like a template's name but is none: what is listed as a name can be asked for.

use mica_shards::{Reference, SnapshotInfo};
use mica_units::TenantId;

/// Longest name that a client gives or asks for. Listed, it also has a namespace and a tag.
const NAME_CHARS_MAX: usize = 128;

/// The name of a snapshot, as one tenant means it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotName {
    /// In the form of a template's name: this tenant's, of this name and tag.
    Template(String),
    /// Any other: a label, without a namespace or a tag.
    Label(String),
}

impl SnapshotName {
    /// Reads what a tenant gave or asks for. `None` where it can be no name of that tenant's.
    pub fn parse(text: &str, tenant: &TenantId) -> Option<Self> {
        if let Some(reference) = Reference::parse(text) {
            let is_own = reference.namespace.as_ref().is_none_or(|space| space == tenant.as_str());
            let full = || format!("{tenant}/{}:{}", reference.name, reference.tag());
            return is_own.then(|| Self::Template(full()));
        }
        let is_label = |b: u8| (b.is_ascii_graphic() || b == b' ') && !matches!(b, b'/' | b':');
        let in_form = (1..=NAME_CHARS_MAX).contains(&text.len()) && text.bytes().all(is_label);
        in_form.then(|| Self::Label(text.to_owned()))
    }

    /// Whether a client may give this name.
    pub fn may_be(text: &str, tenant: &TenantId) -> bool {
        text.len() <= NAME_CHARS_MAX && Self::parse(text, tenant).is_some()
    }

    /// What a snapshot is called. Earlier versions took names that cannot be asked for: those are none.
    pub fn of(info: &SnapshotInfo) -> Option<Self> {
        let tenant = info.tenant.clone().unwrap_or_default();
        Self::parse(info.name.as_ref()?, &tenant)
    }

    /// As it is listed.
    pub fn into_text(self) -> String {
        let (Self::Template(text) | Self::Label(text)) = self;
        text
    }
}

/// The snapshot that a name stands for among a tenant's: of several, the newest.
pub fn newest<'a>(
    all: &'a [SnapshotInfo],
    name: &str,
    tenant: &TenantId,
) -> Option<&'a SnapshotInfo> {
    let wanted = SnapshotName::parse(name, tenant)?;
    let is_own = |info: &&SnapshotInfo| info.tenant.clone().unwrap_or_default() == *tenant;
    let named = all.iter().filter(is_own);
    let named = named.filter(|info| SnapshotName::of(info).as_ref() == Some(&wanted));
    named.max_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn tenant(name: &str) -> TenantId {
        name.parse().unwrap()
    }

    fn parsed(text: &str) -> Option<String> {
        SnapshotName::parse(text, &tenant("us")).map(SnapshotName::into_text)
    }

    fn snapshot(id: &str, name: Option<&str>, of: Option<&str>, second: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: id.to_owned(),
            name: name.map(str::to_owned),
            sandbox: None,
            template_id: "tpl".to_owned(),
            tenant: of.map(tenant),
            created_at: UNIX_EPOCH + Duration::from_secs(second),
        }
    }

    #[test]
    fn every_form_of_a_name_is_one_and_what_is_listed_is_one_of_them() {
        for text in ["app", "App", "us/app", "app:default", "us/app:default", " app "] {
            assert_eq!(parsed(text).as_deref(), Some("us/app:default"), "{text}");
        }
        assert_eq!(parsed("app:v1.2").as_deref(), Some("us/app:v1.2"));
        assert_eq!(parsed("a b").as_deref(), Some("a b"));
        for none in ["them/app", "us/a b", "a:b c", "", "a/b/c", "../a", "a\nb", "\u{e9}"] {
            assert_eq!(parsed(none), None, "{none}");
        }
        // As long as they come, they can be asked for as they are listed.
        let long = format!("{}:{}", "n".repeat(63), "t".repeat(64));
        let owner = tenant(&"o".repeat(32));
        assert!(SnapshotName::may_be(&long, &owner));
        let listed = SnapshotName::parse(&long, &owner).unwrap();
        let asked = SnapshotName::parse(&listed.clone().into_text(), &owner);
        assert_eq!(asked, Some(listed));
        assert!(!SnapshotName::may_be(&"x".repeat(129), &owner));
    }

    #[test]
    fn the_newest_of_the_tenants_own_has_the_name() {
        let all = [
            snapshot("a", Some("app"), Some("us"), 1),
            snapshot("c", Some("us/app:default"), Some("us"), 3),
            snapshot("b", Some("APP"), Some("us"), 2),
            snapshot("d", Some("app"), Some("them"), 4),
            snapshot("e", Some("app:v2"), Some("us"), 5),
            snapshot("f", None, Some("us"), 6),
            // Of a version that took any text, and of the time before there were tenants.
            snapshot("g", Some("them/app"), Some("us"), 7),
            snapshot("h", Some("old"), None, 8),
        ];
        let found = |name: &str, of: &str| {
            newest(&all, name, &tenant(of)).map(|info| info.id.clone()).unwrap_or_default()
        };
        assert_eq!(found("app", "us"), "c");
        assert_eq!(found("us/app:v2", "us"), "e");
        assert_eq!(
            (found("app", "them"), found("us/app", "them")),
            ("d".to_owned(), String::new())
        );
        assert_eq!((found("them/app", "us"), found("old", "us")), (String::new(), String::new()));
        assert_eq!(found("old", "default"), "h");
    }
}
