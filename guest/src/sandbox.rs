//! What the agent knows about the sandbox it is in: the template's settings, and, once the host
//! has told it, its identity.
//!
//! Called by every service. Refuses a second identity that differs from the first.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use mica_wire::guest::InitRequest;
use serde::Deserialize;

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

/// A second identity was offered that is not the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sandbox has its identity already; a sandbox is initialised once")]
pub struct AlreadyInitialised;

/// The sandbox this agent serves.
#[derive(Debug)]
pub struct Sandbox {
    settings: TemplateSettings,
    /// Run as root, and let root stand in for a user that is missing: for a machine that is not
    /// a template's root file system.
    root_user: bool,
    identity: OnceLock<Arc<InitRequest>>,
}

impl Sandbox {
    /// A sandbox without an identity yet.
    #[must_use]
    pub fn new(settings: TemplateSettings, root_user: bool) -> Self {
        Self { settings, root_user, identity: OnceLock::new() }
    }

    /// What the template's builder chose.
    #[must_use]
    pub fn settings(&self) -> &TemplateSettings {
        &self.settings
    }

    /// What the host said, once it has.
    #[must_use]
    pub fn identity(&self) -> Option<Arc<InitRequest>> {
        self.identity.get().cloned()
    }

    /// Takes the identity. `true` when it is the first time, `false` for the same again.
    ///
    /// # Errors
    /// [`AlreadyInitialised`] for another one.
    pub fn set_identity(&self, request: InitRequest) -> Result<bool, AlreadyInitialised> {
        let offered = Arc::new(request);
        let held = self.identity.get_or_init(|| Arc::clone(&offered));
        // The clock has moved on between two tries; everything else must be the same.
        let same =
            InitRequest { wall_clock_unix_ns: held.wall_clock_unix_ns, ..(*offered).clone() };
        match (Arc::ptr_eq(held, &offered), **held == same) {
            (true, _) => Ok(true),
            (false, true) => Ok(false),
            (false, false) => Err(AlreadyInitialised),
        }
    }

    /// The user that a client named, or the template's.
    ///
    /// # Errors
    /// [`UserError`], whose text SDKs compare.
    pub fn user(&self, named: Option<&str>) -> Result<User, UserError> {
        let default = if self.root_user { "root" } else { &self.settings.default_user };
        let name = named.filter(|name| !name.is_empty()).unwrap_or(default);
        match users::find(name) {
            Err(UserError::Unknown(_)) if self.root_user && name == self.settings.default_user => {
                users::find("root")
            }
            found => found,
        }
    }

    /// What every process of the sandbox has in its environment, apart from what its user adds:
    /// the template's variables, then the sandbox's, which win.
    #[must_use]
    pub fn environment(&self) -> BTreeMap<String, String> {
        let mut all = self.settings.env.clone();
        all.insert("E2B_SANDBOX".to_owned(), "true".to_owned());
        if let Some(identity) = self.identity() {
            all.insert("E2B_SANDBOX_ID".to_owned(), identity.sandbox_id.clone());
            all.insert("E2B_TEMPLATE_ID".to_owned(), identity.template_id.clone());
            all.extend(identity.env_vars.clone());
        }
        all
    }

    /// Turns a path that a client wrote into an absolute one: `~` and what is relative are the
    /// user's home, and nothing at all is the template's working directory.
    #[must_use]
    pub fn resolve_path(&self, path: &str, user: &User) -> PathBuf {
        if path.is_empty() {
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
            access_token: None,
            env_vars: BTreeMap::from([("A".to_owned(), "sandbox".to_owned())]),
            wall_clock_unix_ns: 1,
        }
    }

    #[test]
    fn an_identity_is_given_once() {
        let sandbox = Sandbox::new(TemplateSettings::default(), true);
        assert!(sandbox.identity().is_none());
        assert_eq!(sandbox.set_identity(request("a")), Ok(true));
        let later = InitRequest { wall_clock_unix_ns: 2, ..request("a") };
        assert_eq!(sandbox.set_identity(later), Ok(false));
        assert_eq!(sandbox.set_identity(request("b")), Err(AlreadyInitialised));
        assert_eq!(sandbox.identity().unwrap().sandbox_id, "a");
    }

    #[test]
    fn the_sandbox_wins_over_the_template() {
        let env = BTreeMap::from([("A".to_owned(), "template".to_owned())]);
        let sandbox = Sandbox::new(TemplateSettings { env, ..Default::default() }, true);
        assert_eq!(sandbox.environment()["A"], "template");
        sandbox.set_identity(request("a")).unwrap();
        assert_eq!(sandbox.environment()["A"], "sandbox");
        assert_eq!(sandbox.environment()["E2B_SANDBOX_ID"], "a");
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
