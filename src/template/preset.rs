//! What the built-in templates contain.
//!
//! Called by the build. Refuses names of packages that could be read as options.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use serde_json::json;

use super::debian::{is_package, is_requirement};

/// Packages of every template, on top of debootstrap's `minbase`.
pub const BASE_PACKAGES: [&str; 22] = [
    "bash",
    "bzip2",
    "ca-certificates",
    "curl",
    "file",
    "git",
    "iproute2",
    "jq",
    "less",
    "nano",
    "netbase",
    "openssh-client",
    "patch",
    "procps",
    "psmisc",
    "python3",
    "python3-pip",
    "python3-venv",
    "sudo",
    "unzip",
    "xz-utils",
    "zip",
];
/// What a code interpreter needs of PyPI.
const INTERPRETER_PIP: [&str; 7] =
    ["ipykernel", "numpy", "pandas", "matplotlib", "e2b_charts", "bash_kernel", "deno"];

/// The kernels, besides Python's, that run when a sandbox of the interpreter starts.
const INTERPRETER_KERNELS: [&str; 2] = ["javascript", "bash"];

/// A built-in set of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// Python, git, curl, and the user `user` with sudo.
    Base,
    /// `base`, and Jupyter kernels for Python with numpy, pandas and matplotlib, for JavaScript,
    /// TypeScript and bash.
    #[value(name = "code-interpreter-v1")]
    CodeInterpreterV1,
}

/// A language that the code interpreter has only where it is asked for: its kernel starts with the
/// first cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kernel {
    /// R, with `IRkernel`.
    R,
    /// Java 17, with `jjava`.
    Java,
    /// Go: each cell is compiled and run.
    Go,
}

impl Kernel {
    /// Its name in the recipe.
    pub fn name(self) -> &'static str {
        match self {
            Self::R => "r",
            Self::Java => "java",
            Self::Go => "go",
        }
    }

    fn packages(self) -> &'static [&'static str] {
        match self {
            Self::R => &["r-cran-irkernel"],
            Self::Java => &["openjdk-17-jdk-headless"],
            Self::Go => &["golang-go"],
        }
    }

    fn pip(self) -> &'static [&'static str] {
        match self {
            // There are only pre-releases, and pip takes one where it is named.
            Self::Java => &["jjava>=1.0a8"],
            Self::R | Self::Go => &[],
        }
    }
}

/// What goes into a root file system on top of the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Debian packages.
    pub packages: Vec<String>,
    /// Requirements for pip.
    pub pip: Vec<String>,
    /// Whether the code interpreter is started.
    pub interpreter: bool,
    /// Its optional kernels.
    pub kernels: Vec<Kernel>,
}

impl Preset {
    /// The preset a template of that name is, unless another is asked for.
    pub fn for_name(name: &str) -> Self {
        match name {
            "code-interpreter-v1" => Self::CodeInterpreterV1,
            _ => Self::Base,
        }
    }

    /// Its contents and the additions.
    ///
    /// # Errors
    /// When an addition is not a name, and for kernels without the interpreter.
    pub fn contents(
        self,
        packages: &[String],
        pip: &[String],
        kernels: &[Kernel],
    ) -> Result<Contents> {
        if let Some(bad) = packages.iter().find(|name| !is_package(name)) {
            bail!("`{bad}` is not the name of a Debian package (NAME or NAME=VERSION)");
        }
        if let Some(bad) = pip.iter().find(|text| !is_requirement(text)) {
            bail!("`{bad}` is not a PyPI requirement (NAME, NAME[EXTRA], NAME==VERSION)");
        }
        let interpreter = self == Self::CodeInterpreterV1;
        if !interpreter && !kernels.is_empty() {
            bail!("--kernel adds to the code interpreter; give --preset code-interpreter-v1 too");
        }
        let built_in: &[&str] = if interpreter { &INTERPRETER_PIP } else { &[] };
        let of_kernels = |list: fn(Kernel) -> &'static [&'static str]| {
            kernels.iter().flat_map(move |kernel| list(*kernel)).map(|&name| name.to_owned())
        };
        let all = built_in.iter().map(|&name| name.to_owned()).chain(of_kernels(Kernel::pip));
        Ok(Contents {
            packages: once(of_kernels(Kernel::packages).chain(packages.iter().cloned())),
            pip: once(all.chain(pip.iter().cloned())),
            interpreter,
            kernels: kernels.to_vec(),
        })
    }
}

/// The items in their order, each the first time only.
fn once(items: impl Iterator<Item = String>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for item in items {
        if !all.contains(&item) {
            all.push(item);
        }
    }
    all
}

impl Contents {
    /// The agent's configuration file in the root file system, with the environment of its base.
    pub fn template_json(&self, env: &BTreeMap<String, String>) -> String {
        let kernels: &[&str] = if self.interpreter { &INTERPRETER_KERNELS } else { &[] };
        let services = json!({ "interpreter": self.interpreter, "kernels": kernels });
        let settings = json!({
            "default_user": "user", "workdir": "/home/user", "env": env, "services": services,
        });
        format!("{settings}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn additions_come_after_the_presets_own() {
        let pip = ["scipy".to_owned(), "numpy".to_owned()];
        let contents = Preset::CodeInterpreterV1.contents(&[], &pip, &[]).unwrap();
        assert_eq!(contents.pip.last().map(String::as_str), Some("scipy"));
        assert_eq!(contents.pip.iter().filter(|p| *p == "numpy").count(), 1);
        let env = BTreeMap::from([("A".to_owned(), "a \"b\"".to_owned())]);
        let json = contents.template_json(&env);
        assert!(
            json.contains("\"interpreter\":true,\"kernels\":[\"javascript\",\"bash\"]"),
            "{json}"
        );
        assert!(json.contains(r#""env":{"A":"a \"b\""}"#), "{json}");
        assert_eq!(Preset::for_name("base"), Preset::Base);
        assert_eq!(Preset::for_name("code-interpreter-v1"), Preset::CodeInterpreterV1);
        assert!(Preset::Base.contents(&["--force-yes".to_owned()], &[], &[]).is_err());
        assert!(Preset::Base.contents(&[], &["-rx".to_owned()], &[]).is_err());
    }

    #[test]
    fn kernels_bring_their_packages() {
        let packages = ["golang-go".to_owned(), "jq".to_owned()];
        let kernels = [Kernel::R, Kernel::Go, Kernel::Java];
        let contents = Preset::CodeInterpreterV1.contents(&packages, &[], &kernels).unwrap();
        let wanted = ["r-cran-irkernel", "golang-go", "openjdk-17-jdk-headless", "jq"];
        assert_eq!(contents.packages, wanted);
        assert!(contents.pip.contains(&"jjava>=1.0a8".to_owned()));
        let error = Preset::Base.contents(&[], &[], &[Kernel::R]).unwrap_err();
        assert!(error.to_string().contains("--preset code-interpreter-v1"), "{error}");
    }
}
