//! What the agent knows about the sandbox it is in: the template's settings, and, once the host
//! has told it, its identity.
//!
//! Called by every service. The agent's memory is saved with the guest's and goes on in every
//! sandbox that is restored from it, so the identity changes while the agent runs: the last one
//! counts, and a request keeps the one that it began with. Refuses nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mica_wire::guest::{Defaults, InitRequest};
use serde::Deserialize;
use tokio::sync::watch;

use crate::users::{self, User, UserError};

/// Longest `/etc/mica/template.json`.
const TEMPLATE_BYTES_MAX: u64 = 1024 * 1024;

/// `/etc/mica/template.json`: what the template's builder chose.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct TemplateSettings {
    /// Who a client is when it names nobody.
    pub default_user: String,
    /// Where a process starts when the client names no directory; empty for the user's home.
    pub workdir: String,
    /// Environment of every process.
    pub env: BTreeMap<String, String>,
    /// Which services run beside envd.
    pub services: Services,
}

/// The optional services of a template.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Services {
    /// The code interpreter on 49999.
    pub interpreter: bool,
    /// The languages, besides Python, whose kernels start with the agent.
    pub kernels: Vec<String>,
}

impl Default for TemplateSettings {
    fn default() -> Self {
        Self {
            default_user: "user".to_owned(),
            workdir: String::new(),
            env: BTreeMap::new(),
            services: Services::default(),
        }
    }
}

/// Why the template's settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("cannot read the template's settings {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not in form.
    #[error("the template's settings {path} are not in form; build the template again")]
    Form {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl TemplateSettings {
    /// Reads the settings; a file that is not there means the defaults.
    ///
    /// # Errors
    /// [`SettingsError`].
    pub fn read(path: &Path) -> Result<Self, SettingsError> {
        use std::io::Read as _;
        let fail = |source| SettingsError::Read { path: path.to_owned(), source };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(fail(error)),
        };
        let mut bytes = Vec::new();
        file.take(TEMPLATE_BYTES_MAX).read_to_end(&mut bytes).map_err(fail)?;
        serde_json::from_slice(&bytes)
            .map_err(|source| SettingsError::Form { path: path.to_owned(), source })
    }
}

/// Who the sandbox is at a moment.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    /// What the host said last; nothing while a template is made.
    pub identity: Option<Arc<InitRequest>>,
    /// How many sandboxes this memory has been. What must differ between two restores of one
    /// state, such as the state of a random generator, is as old as the number it was made under.
    pub sandboxes: u64,
}

/// The sandbox this agent serves.
#[derive(Debug)]
pub struct Sandbox {
    settings: TemplateSettings,
    /// Run as root, and let root stand in for a user that is missing: for a machine that is not
    /// a template's root file system.
    root_user: bool,
    /// What the host said before this guest was booted again, of the disk.
    booted_with: Option<Defaults>,
    standing: watch::Sender<Standing>,
}

impl Sandbox {
    /// A sandbox without an identity yet.
    #[must_use]
    pub fn new(settings: TemplateSettings, root_user: bool) -> Self {
        Self { settings, root_user, booted_with: None, standing: watch::Sender::default() }
    }

    /// The same, booted from the disk of one that had been told these defaults.
    #[must_use]
    pub fn booted_with(self, defaults: Option<Defaults>) -> Self {
        Self { booted_with: defaults, ..self }
    }

    /// What the template's builder chose.
    #[must_use]
    pub fn settings(&self) -> &TemplateSettings {
        &self.settings
    }

    /// What the host said last, once it has.
    #[must_use]
    pub fn identity(&self) -> Option<Arc<InitRequest>> {
        self.standing.borrow().identity.clone()
    }

    /// Who the sandbox is now.
    #[must_use]
    pub fn standing(&self) -> Standing {
        self.standing.borrow().clone()
    }

    /// Takes an identity in place of the one before, if any. Returns that one, and whether this is
    /// another sandbox: what the host says, and what is plain from the ids. Defaults that the host does
    /// not repeat stay: they are the memory's, whoever it becomes.
    pub fn set_identity(&self, mut request: InitRequest) -> (Option<Arc<InitRequest>>, bool) {
        let former = self.identity();
        let kept = || match &former {
            Some(former) => former.defaults.clone(),
            None => self.booted_with.clone(),
        };
        request.defaults = request.defaults.or_else(kept);
        let same_id = former.as_ref().is_some_and(|former| former.sandbox_id == request.sandbox_id);
        let is_new = request.new_sandbox || !same_id;
        self.standing.send_modify(|standing| {
            standing.identity = Some(Arc::new(request));
            standing.sandboxes += u64::from(is_new);
        });
        (former, is_new)
    }

    /// Resolves when the sandbox is no longer the one it is at the call.
    pub fn replaced(&self) -> impl Future<Output = ()> + use<> {
        let mut standing = self.standing.subscribe();
        let now = standing.borrow_and_update().sandboxes;
        async move {
            // An error means that there is no sandbox any more.
            drop(standing.wait_for(|standing| standing.sandboxes != now).await);
        }
    }

    /// What the host said that the template's builder chose, if it did.
    #[must_use]
    pub fn defaults(&self) -> Option<Defaults> {
        self.identity().and_then(|identity| identity.defaults.clone())
    }

    /// The user that a client named, or the template's.
    ///
    /// # Errors
    /// [`UserError`], whose text SDKs compare.
    pub fn user(&self, named: Option<&str>) -> Result<User, UserError> {
        let built = self.defaults().and_then(|defaults| defaults.user);
        let default = match &built {
            Some(user) => user,
            None if self.root_user => "root",
            None => &self.settings.default_user,
        };
        let name = named.filter(|name| !name.is_empty()).unwrap_or(default);
        match users::find(name) {
            Err(UserError::Unknown(_)) if self.root_user && name == self.settings.default_user => {
                users::find("root")
            }
            found => found,
        }
    }

    /// What every process of a sandbox has in its environment, apart from what its user adds: the
    /// template's variables, then the sandbox's, which win.
    #[must_use]
    pub fn environment_of(&self, identity: Option<&InitRequest>) -> BTreeMap<String, String> {
        let mut all = self.settings.env.clone();
        all.insert("E2B_SANDBOX".to_owned(), "true".to_owned());
        if let Some(identity) = identity {
            all.extend(identity.defaults.iter().flat_map(|defaults| defaults.env.clone()));
            all.insert("E2B_SANDBOX_ID".to_owned(), identity.sandbox_id.clone());
            all.insert("E2B_TEMPLATE_ID".to_owned(), identity.template_id.clone());
            all.extend(identity.env_vars.clone());
        }
        // What is not a variable's name or value would keep a program from starting.
        all.retain(|name, value| {
            !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0')
        });
        all
    }

    /// Turns a path that a client wrote into an absolute one: `~` and what is relative are the
    /// user's home, and nothing at all is the template's working directory.
    #[must_use]
    pub fn resolve_path(&self, path: &str, user: &User) -> PathBuf {
        if path.is_empty() {
            if let Some(workdir) = self.defaults().and_then(|defaults| defaults.workdir) {
                return PathBuf::from(workdir);
            }
            let workdir = &self.settings.workdir;
            return if workdir.is_empty() || self.root_user {
                user.home.clone()
            } else {
                PathBuf::from(workdir)
            };
        }
        match path.strip_prefix('~') {
            Some("") => user.home.clone(),
            Some(rest) if rest.starts_with('/') => user.home.join(rest.trim_start_matches('/')),
            // `join` keeps an absolute path as it is.
            _ => user.home.join(path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(id: &str) -> InitRequest {
        InitRequest {
            sandbox_id: id.to_owned(),
            template_id: "t".to_owned(),
            machine_id: "0".repeat(32),
            access_token: None,
            env_vars: BTreeMap::from([("A".to_owned(), "sandbox".to_owned())]),
            wall_clock_unix_ns: 1,
            new_sandbox: false,
            defaults: None,
        }
    }

    #[test]
    fn defaults_of_a_built_template_stay_until_others_come() {
        let settings = TemplateSettings { workdir: "/code".to_owned(), ..Default::default() };
        let sandbox = Sandbox::new(settings, false);
        let root = users::find("root").unwrap();
        let env = |name: &str, value: &str| BTreeMap::from([(name.to_owned(), value.to_owned())]);
        let defaults = Defaults {
            env: BTreeMap::from(
                [("A", "built"), ("B", "built")].map(|(n, v)| (n.into(), v.into())),
            ),
            workdir: Some("/app".to_owned()),
            user: Some("root".to_owned()),
        };
        sandbox.set_identity(InitRequest { defaults: Some(defaults.clone()), ..request("a") });
        // The same sandbox goes on, and then another is made of its memory.
        for next in [request("a"), request("b")] {
            sandbox.set_identity(next);
            let all = sandbox.environment_of(sandbox.identity().as_deref());
            assert_eq!((all["A"].as_str(), all["B"].as_str()), ("sandbox", "built"));
            assert_eq!(sandbox.resolve_path("", &root), PathBuf::from("/app"));
            assert_eq!(sandbox.user(None).unwrap().name, "root");
        }
        // Booted from the disk of one, a sandbox has what was kept there, unless it is told again.
        let booted = Sandbox::new(TemplateSettings::default(), false).booted_with(Some(defaults));
        booted.set_identity(request("a"));
        assert_eq!(booted.resolve_path("", &root), PathBuf::from("/app"));
        let other = Defaults { env: env("C", "1"), ..Defaults::default() };
        sandbox.set_identity(InitRequest { defaults: Some(other), ..request("c") });
        assert_eq!(sandbox.resolve_path("", &root), PathBuf::from("/code"));
        let all = sandbox.environment_of(sandbox.identity().as_deref());
        assert!(all.contains_key("C") && !all.contains_key("B"));
    }

    #[test]
    fn the_last_identity_counts() {
        let sandbox = Sandbox::new(TemplateSettings::default(), true);
        assert!(sandbox.identity().is_none());
        for (offered, former, is_new) in [
            (request("a"), None, true),
            (request("a"), Some("a"), false),
            (request("b"), Some("a"), true),
            (InitRequest { new_sandbox: true, ..request("b") }, Some("b"), true),
        ] {
            let wanted = offered.sandbox_id.clone();
            let (before, found) = sandbox.set_identity(offered);
            assert_eq!(before.as_ref().map(|before| before.sandbox_id.as_str()), former);
            assert_eq!(found, is_new);
            assert_eq!(sandbox.identity().unwrap().sandbox_id, wanted);
        }
        assert_eq!(sandbox.standing().sandboxes, 3);
    }

    #[tokio::test]
    async fn only_another_sandbox_replaces_one() {
        let sandbox = Sandbox::new(TemplateSettings::default(), true);
        sandbox.set_identity(request("a"));
        let replaced = tokio::spawn(sandbox.replaced());
        sandbox.set_identity(request("a"));
        tokio::task::yield_now().await;
        assert!(!replaced.is_finished());
        sandbox.set_identity(request("b"));
        replaced.await.unwrap();
        tokio::time::timeout(std::time::Duration::from_millis(1), sandbox.replaced())
            .await
            .unwrap_err();
    }

    #[test]
    fn the_sandbox_wins_over_the_template() {
        let env = BTreeMap::from([("A".to_owned(), "template".to_owned())]);
        let sandbox = Sandbox::new(TemplateSettings { env, ..Default::default() }, true);
        assert_eq!(sandbox.environment_of(None)["A"], "template");
        let mut identity = request("a");
        for (name, value) in [("", "1"), ("B=C", "1"), ("D", "1\0")] {
            identity.env_vars.insert(name.to_owned(), value.to_owned());
        }
        let all = sandbox.environment_of(Some(&identity));
        assert_eq!((all["A"].as_str(), all["E2B_SANDBOX_ID"].as_str()), ("sandbox", "a"));
        assert_eq!(all.len(), 4, "{all:?}");
    }

    #[test]
    fn paths_start_at_home() {
        let settings = TemplateSettings { workdir: "/code".to_owned(), ..Default::default() };
        let sandbox = Sandbox::new(settings, false);
        let user = users::find("root").unwrap();
        for (given, wanted) in [
            ("", "/code"),
            ("~", "/root"),
            ("~/a", "/root/a"),
            ("a/b", "/root/a/b"),
            ("/x", "/x"),
            ("~x", "/root/~x"),
        ] {
            assert_eq!(sandbox.resolve_path(given, &user), PathBuf::from(wanted), "{given}");
        }
    }

    #[test]
    fn root_stands_in_only_where_asked() {
        let settings =
            TemplateSettings { default_user: "nobody-at-all".to_owned(), ..Default::default() };
        let strict = Sandbox::new(settings.clone(), false);
        assert!(strict.user(None).is_err());
        let native = Sandbox::new(settings, true);
        assert_eq!(native.user(None).unwrap().name, "root");
        assert_eq!(native.user(Some("nobody-at-all")).unwrap().name, "root");
        assert!(native.user(Some("someone-else")).is_err());
    }
}
