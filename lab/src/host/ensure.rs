//! `mica-lab template NAME`: the named template, built out here at native speed, and carried in.
//!
//! Called by the command line, by `make demo` and by the end-to-end tests. Builds into a store of
//! this machine with `mica template build`, which does nothing when nothing changed, and carries the
//! archive in only when the host has another build of that name, or none. Refuses to guess what a
//! template is made of: that is the inputs hash, and `mica template` knows it.

use super::channel::client::Channel;
use super::drives::TOOLS;
use super::image;
use super::progress::say;
use super::state::Home;
use super::template;
use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What `mica template list --json` says of one template, as far as it matters here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    name: String,
    inputs_hash: String,
}

/// The store of this machine that builds end in: in the cache, so that all labs share it.
fn outer_store() -> PathBuf {
    image::cache_directory().with_file_name("store")
}

/// Builds the template if it is out of date here, and carries it in if it is out of date there.
/// `options` go to `mica template build` as they are.
pub fn ensure(home: &Home, mica: &Path, name: &str, options: &[String]) -> Result<()> {
    let lab = home.running()?;
    let store = outer_store();
    let built = Command::new(mica)
        .args(["template", "build", "--name", name, "--store"])
        .arg(&store)
        .args(options)
        .status()
        .with_context(|| format!("run {}", mica.display()))?;
    ensure!(built.success(), "mica template build --name {name} failed: {built}");

    let here = hash_of(name, &outer_list(mica, &store)?)?
        .with_context(|| format!("{name} is not in {} after its build", store.display()))?;
    if hash_of(name, &inner_list(&lab.channel())?)?.as_ref() == Some(&here) {
        say(&format!("the host has {name} already"));
        return Ok(());
    }
    let archive = tempfile_in(&store, name);
    let carried = export(mica, &store, name, &archive)
        .and_then(|()| template::push(home, &archive, true))
        .and_then(|code| match code {
            0 => Ok(()),
            code => bail!("mica template import ended with {code} in the host"),
        });
    std::fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
    carried
}

fn tempfile_in(store: &Path, name: &str) -> PathBuf {
    store.with_file_name(format!("{name}.{}.tar", std::process::id()))
}

fn export(mica: &Path, store: &Path, name: &str, archive: &Path) -> Result<()> {
    say(&format!("carrying {name} into the host"));
    let exported = Command::new(mica)
        .args(["template", "export", name, "--store"])
        .arg(store)
        .arg("--output")
        .arg(archive)
        .status()
        .context("run mica template export")?;
    // A file must be there to be removed, whatever happened.
    if !exported.success() {
        std::fs::File::create(archive).with_context(|| format!("make {}", archive.display()))?;
        bail!("mica template export {name} failed: {exported}");
    }
    Ok(())
}

fn outer_list(mica: &Path, store: &Path) -> Result<String> {
    let mut command = Command::new(mica);
    command.args(["template", "list", "--json", "--store"]).arg(store);
    super::run::capture("list this machine's templates", &mut command)
}

fn inner_list(channel: &Channel) -> Result<String> {
    let program = format!("{TOOLS}/bin/mica");
    let listed =
        channel.exec_with_input(&[&program, "template", "list", "--json"], std::io::empty())?;
    ensure!(listed.code == 0, "list the host's templates: {}", listed.text());
    String::from_utf8(listed.stdout).context("the host's list is not UTF-8")
}

fn hash_of(name: &str, json: &str) -> Result<Option<String>> {
    let listed: Vec<Listed> =
        serde_json::from_str(json).context("read what mica template list --json printed")?;
    Ok(listed.into_iter().find(|t| t.name == name).map(|t| t.inputs_hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_of_the_named_template_is_found() {
        let json = r#"[{"name":"a","inputsHash":"1","other":2},{"name":"b","inputsHash":"2"}]"#;
        assert_eq!(hash_of("b", json).unwrap(), Some("2".to_owned()));
        assert_eq!(hash_of("c", json).unwrap(), None);
        assert!(hash_of("a", "no json").is_err());
    }
}
