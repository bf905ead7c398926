//! What the built-in templates contain.
//!
//! Called by the build. Refuses names of packages that could be read as options.

use anyhow::{Result, bail};

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
const INTERPRETER_PIP: [&str; 5] = ["ipykernel", "numpy", "pandas", "matplotlib", "e2b_charts"];

/// A built-in set of contents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Preset {
    /// Python, git, curl, and the user `user` with sudo.
    Base,
    /// `base`, and a Jupyter kernel with numpy, pandas and matplotlib.
    #[value(name = "code-interpreter-v1")]
    CodeInterpreterV1,
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
    /// When an addition is not a name.
    pub fn contents(self, packages: &[String], pip: &[String]) -> Result<Contents> {
        if let Some(bad) = packages.iter().find(|name| !is_package(name)) {
            bail!("`{bad}` is not the name of a Debian package (NAME or NAME=VERSION)");
        }
        if let Some(bad) = pip.iter().find(|text| !is_requirement(text)) {
            bail!("`{bad}` is not a PyPI requirement (NAME, NAME[EXTRA], NAME==VERSION)");
        }
        let interpreter = self == Self::CodeInterpreterV1;
        let built_in: &[&str] = if interpreter { &INTERPRETER_PIP } else { &[] };
        let mut all: Vec<String> = built_in.iter().map(|&name| name.to_owned()).collect();
        all.extend(pip.iter().filter(|&text| !built_in.contains(&text.as_str())).cloned());
        Ok(Contents { packages: packages.to_vec(), pip: all, interpreter })
    }
}

impl Contents {
    /// The agent's configuration file in the root file system.
    pub fn template_json(&self) -> String {
        format!(
            "{{\"default_user\":\"user\",\"workdir\":\"/home/user\",\"env\":{{}},\
             \"services\":{{\"interpreter\":{}}}}}\n",
            self.interpreter
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn additions_come_after_the_presets_own() {
        let pip = ["scipy".to_owned(), "numpy".to_owned()];
        let contents = Preset::CodeInterpreterV1.contents(&[], &pip).unwrap();
        assert_eq!(contents.pip.last().map(String::as_str), Some("scipy"));
        assert_eq!(contents.pip.iter().filter(|p| *p == "numpy").count(), 1);
        assert!(contents.template_json().contains("\"interpreter\":true"));
        assert_eq!(Preset::for_name("base"), Preset::Base);
        assert_eq!(Preset::for_name("code-interpreter-v1"), Preset::CodeInterpreterV1);
        assert!(Preset::Base.contents(&["--force-yes".to_owned()], &[]).is_err());
        assert!(Preset::Base.contents(&[], &["-rx".to_owned()]).is_err());
    }
}
