//! Templates that clients built: finding them, and what moves their tags.
//!
//! Called by the API through [`BuildStore`]. Refuses names and tags out of form, and more templates of a
//! tenant than [`TEMPLATES_MAX`]. Looking a name up reads the tenant's own templates alone: an index of empty
//! files says which those are. A start makes it again from the templates, so it is only ever a hint. What changes a template gives back the snapshots that none names any more;
//! who asked for the change deletes them.

use std::collections::BTreeSet;
use std::path::PathBuf;

use mica_units::{TemplateName, TenantId};

use super::index::Index;
use super::{
    BuildStore, BuildStoreError, Built, BuiltTag, BuiltTemplate, encoded, names, now_unix_ms, read,
};
use crate::error::{Result, StorageError};
use crate::id::{self, is_id};
use crate::store::chain;

/// What a name without a tag stands for.
pub const DEFAULT_TAG: &str = "default";

/// Templates of one tenant.
const TEMPLATES_MAX: usize = 1000;
/// Tags of one template.
const TAGS_MAX: usize = 100;
const TAG_CHARS_MAX: usize = 64;

/// How clients name a template: `name`, `name:tag`, `namespace/name:tag`, or an id in place of the name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// A tenant's name, when there is one.
    pub namespace: Option<String>,
    /// A name or an id.
    pub name: String,
    /// A tag, when there is one.
    pub tag: Option<String>,
}

impl Reference {
    /// Reads one. Letters become lower case, as E2B has it. `None` when it is out of form.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        let (namespace, rest) = match text.split_once('/') {
            Some((namespace, rest)) => (Some(namespace.to_owned()), rest),
            None => (None, text.as_str()),
        };
        let (name, tag) = match rest.split_once(':') {
            Some((name, tag)) => (name, Some(tag.to_owned())),
            None => (rest, None),
        };
        let in_form = name.parse::<TemplateName>().is_ok()
            && namespace.as_ref().is_none_or(|space| space.parse::<TenantId>().is_ok())
            && tag.as_ref().is_none_or(|tag| Self::is_tag(tag));
        in_form.then(|| Self { namespace, name: name.to_owned(), tag })
    }

    /// Whether this can be a tag.
    #[must_use]
    pub fn is_tag(text: &str) -> bool {
        matches!(text.len(), 1..=TAG_CHARS_MAX)
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
    }

    /// The tag, or the one that stands for none.
    #[must_use]
    pub fn tag(&self) -> &str {
        self.tag.as_deref().unwrap_or(DEFAULT_TAG)
    }
}

impl BuildStore {
    /// The template of this name for a tenant: a new one unless it is there.
    ///
    /// # Errors
    /// [`BuildStoreError::TooMany`]; when it cannot be written.
    pub fn template_for(
        &self,
        tenant: &TenantId,
        name: &str,
    ) -> std::result::Result<BuiltTemplate, BuildStoreError> {
        let _alone = self.lock()?;
        let ours = self.built_templates(tenant)?;
        let count = ours.len();
        if let Some(found) = ours.into_iter().find(|template| template.name == name) {
            return Ok(found);
        }
        if count >= TEMPLATES_MAX {
            let text = format!("this tenant has {TEMPLATES_MAX} templates; delete some of them");
            return Err(BuildStoreError::TooMany(text));
        }
        let id = id::random_text()
            .map_err(|error| StorageError::io("draw", &self.templates_dir(), error))?;
        let now = now_unix_ms();
        let template = BuiltTemplate {
            id,
            tenant: tenant.as_str().to_owned(),
            name: name.to_owned(),
            public: false,
            created_unix_ms: now,
            updated_unix_ms: now,
            build_count: 0,
            tags: Vec::new(),
            builds: Vec::new(),
        };
        self.enter(Index::Templates, &template.tenant, &template.id)?;
        self.store_template(&template)?;
        Ok(template)
    }

    /// Every template of a tenant's, the oldest first; those without a build that is done, too.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn built_templates(&self, tenant: &TenantId) -> Result<Vec<BuiltTemplate>> {
        let mut all = self.templates_of(tenant)?;
        all.sort_by(|a, b| (a.created_unix_ms, &a.id).cmp(&(b.created_unix_ms, &b.id)));
        Ok(all)
    }

    /// The template that a tenant means: its own, or one of another's that is public.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn find_built(
        &self,
        tenant: &TenantId,
        reference: &Reference,
    ) -> Result<Option<BuiltTemplate>> {
        let space = reference.namespace.as_deref();
        let may = |template: &BuiltTemplate| {
            let own = template.tenant == tenant.as_str();
            let meant = space.is_none_or(|space| space == template.tenant);
            meant && (own || template.public)
        };
        if is_id(&reference.name)
            && let Some(found) = self.read_template(&reference.name)?
        {
            return Ok(Some(found).filter(may));
        }
        // Without a namespace a name is one of the tenant's own.
        let Ok(owner) = space.unwrap_or(tenant.as_str()).parse() else { return Ok(None) };
        let found = self.templates_of(&owner)?.into_iter().find(|t| t.name == reference.name);
        Ok(found.filter(may))
    }

    /// Gives a build that is done to its template, under these tags. Its snapshots that no tag stands for
    /// any more; `None` when the template is gone.
    ///
    /// # Errors
    /// When it cannot be written. The template is then as it was.
    pub fn add_built(
        &self,
        template_id: &str,
        tags: &[String],
        built: Built,
    ) -> std::result::Result<Option<Vec<String>>, BuildStoreError> {
        let _alone = self.lock()?;
        let Some(mut template) = self.read_template(template_id)? else { return Ok(None) };
        let build_id = built.build_id.clone();
        template.builds.push(built);
        template.build_count = template.build_count.saturating_add(1);
        self.move_tags(template, tags, &build_id).map(Some)
    }

    /// Lets tags stand for what another tag stands for: the build, and the snapshots that no tag stands
    /// for any more. `None` when there is no such template or tag.
    ///
    /// # Errors
    /// As [`Self::add_built`].
    pub fn assign_tags(
        &self,
        template_id: &str,
        from: &str,
        tags: &[String],
    ) -> std::result::Result<Option<(String, Vec<String>)>, BuildStoreError> {
        let _alone = self.lock()?;
        let Some(template) = self.read_template(template_id)? else { return Ok(None) };
        let Some(build_id) = template.tagged(from).map(|built| built.build_id.clone()) else {
            return Ok(None);
        };
        let freed = self.move_tags(template, tags, &build_id)?;
        Ok(Some((build_id, freed)))
    }

    /// Takes tags away. The snapshots that no tag stands for any more; `None` when there is no such
    /// template, or it lacks one of the tags.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn remove_tags(&self, template_id: &str, tags: &[String]) -> Result<Option<Vec<String>>> {
        let _alone = self.lock()?;
        let Some(mut template) = self.read_template(template_id)? else { return Ok(None) };
        if !tags.iter().all(|tag| template.tags.iter().any(|held| held.tag == *tag)) {
            return Ok(None);
        }
        template.tags.retain(|held| !tags.contains(&held.tag));
        self.store_pruned(template).map(Some)
    }

    /// Says whether other tenants may use a template. `None` when it is gone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn set_public(&self, template_id: &str, public: bool) -> Result<Option<BuiltTemplate>> {
        let _alone = self.lock()?;
        let Some(mut template) = self.read_template(template_id)? else { return Ok(None) };
        template.public = public;
        self.store_template(&template)?;
        Ok(Some(template))
    }

    /// Gives a template another name, and keeps its id, its tags and its builds. `None` when it is gone.
    ///
    /// # Errors
    /// [`BuildStoreError::NameTaken`]; when it cannot be written.
    pub fn rename(
        &self,
        template_id: &str,
        name: &str,
    ) -> std::result::Result<Option<BuiltTemplate>, BuildStoreError> {
        let _alone = self.lock()?;
        let Some(mut template) = self.read_template(template_id)? else { return Ok(None) };
        let Ok(tenant) = template.tenant.parse() else { return Ok(None) };
        let has_it = |other: &BuiltTemplate| other.name == name && other.id != template.id;
        if self.templates_of(&tenant)?.iter().any(has_it) {
            let text = format!("`{name}` is another template of yours; take another name");
            return Err(BuildStoreError::NameTaken(text));
        }
        name.clone_into(&mut template.name);
        self.store_template(&template)?;
        Ok(Some(template))
    }

    /// Deletes a template: its snapshots, which are to be deleted now. `None` when it is gone.
    ///
    /// # Errors
    /// When its name could not be taken away.
    pub fn remove_built(&self, template_id: &str) -> Result<Option<Vec<String>>> {
        let _alone = self.lock()?;
        let Some(template) = self.read_template(template_id)? else { return Ok(None) };
        self.store.disk.remove_name(&self.templates_dir(), template_id)?;
        self.leave(Index::Templates, &template.tenant, template_id);
        Ok(Some(template.builds.into_iter().map(|built| built.snapshot_id).collect()))
    }

    /// The snapshots that templates name, with the index made again. `None` when one of them cannot be read.
    pub(super) fn named_snapshots(&self) -> Result<Option<BTreeSet<String>>> {
        let (all, unreadable) = self.all_templates()?;
        let known = names(&self.templates_dir())?.into_iter().collect();
        let entries = all.iter().map(|template| (template.tenant.as_str(), template.id.as_str()));
        self.index_again(Index::Templates, entries, &known)?;
        let named = all.into_iter().flat_map(|template| template.builds);
        let named = named.map(|built| built.snapshot_id).collect();
        Ok((unreadable == 0).then_some(named))
    }

    fn templates_dir(&self) -> PathBuf {
        self.store.root().join("builds/templates")
    }

    fn read_template(&self, id: &str) -> Result<Option<BuiltTemplate>> {
        if !is_id(id) {
            return Ok(None);
        }
        let found = read(&self.templates_dir().join(id), BuiltTemplate::decode)?;
        Ok(found.filter(|template| template.id == id))
    }

    /// A tenant's templates. What cannot be read is left out, and logged.
    fn templates_of(&self, tenant: &TenantId) -> Result<Vec<BuiltTemplate>> {
        let (mut found, _) = self.read_templates(self.entries_of(Index::Templates, tenant)?);
        found.retain(|template| template.tenant == tenant.as_str());
        Ok(found)
    }

    /// Every template, and how many cannot be read.
    fn all_templates(&self) -> Result<(Vec<BuiltTemplate>, usize)> {
        Ok(self.read_templates(names(&self.templates_dir())?))
    }

    fn read_templates(&self, ids: Vec<String>) -> (Vec<BuiltTemplate>, usize) {
        let (mut all, mut unreadable) = (Vec::new(), 0);
        for id in ids {
            match self.read_template(&id) {
                Ok(found) => all.extend(found),
                Err(error) => {
                    unreadable += 1;
                    tracing::error!(id, error = chain(&error), "a built template left out");
                }
            }
        }
        (all, unreadable)
    }

    fn store_template(&self, template: &BuiltTemplate) -> Result<()> {
        self.put(&self.templates_dir(), &template.id, &encoded(template.encode())?)
    }

    fn move_tags(
        &self,
        mut template: BuiltTemplate,
        tags: &[String],
        build_id: &str,
    ) -> std::result::Result<Vec<String>, BuildStoreError> {
        let now = now_unix_ms();
        template.tags.retain(|held| !tags.contains(&held.tag));
        let tags: BTreeSet<&String> = tags.iter().collect();
        template.tags.extend(tags.into_iter().map(|tag| BuiltTag {
            tag: tag.clone(),
            build_id: build_id.to_owned(),
            assigned_unix_ms: now,
        }));
        if template.tags.len() > TAGS_MAX {
            let text = format!("a template has at most {TAGS_MAX} tags; remove some of them");
            return Err(BuildStoreError::TooMany(text));
        }
        Ok(self.store_pruned(template)?)
    }

    /// Stores a template without the builds that no tag stands for.
    fn store_pruned(&self, mut template: BuiltTemplate) -> Result<Vec<String>> {
        template.updated_unix_ms = now_unix_ms();
        let tags = std::mem::take(&mut template.tags);
        let (kept, freed): (Vec<Built>, Vec<Built>) = template
            .builds
            .into_iter()
            .partition(|built| tags.iter().any(|tag| tag.build_id == built.build_id));
        let template = BuiltTemplate { tags, builds: kept, ..template };
        self.store_template(&template)?;
        Ok(freed.into_iter().map(|built| built.snapshot_id).collect())
    }
}
