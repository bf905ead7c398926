//! Asks a host for its state and its numbers.
//!
//! Called by [`super`]. Refuses answers without a bound, redirects, and proxies of the environment: the key goes to
//! the host that was named, and nowhere else.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow, bail};
use mica_wire::api::{HostState, HostSummary, SandboxSummary};
use ureq::Agent;
use ureq::http::Response;

use super::exposition;
use super::model::Look;

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// A page of sandboxes is some 50 KiB; the numbers of a host with a hundred shards are 20 MiB.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Pages of sandboxes, a hundred each, that are asked for at most.
const PAGES_MAX: usize = 50;

/// A host, and the key to it.
#[derive(Debug)]
pub struct Client {
    agent: Agent,
    url: String,
    key: Option<String>,
}

impl Client {
    /// # Errors
    /// For an address that is not one.
    pub fn new(url: &str, key: Option<&str>) -> Result<Self> {
        let url = url.trim().trim_end_matches('/');
        if url.starts_with("https://") {
            bail!(
                "`mica top` speaks no TLS; a host takes http:// on the same port: --url http://…"
            );
        }
        if !url.starts_with("http://") || url.len() == "http://".len() {
            bail!("`{url}` is no address of a host; one looks like http://127.0.0.1:3000");
        }
        let agent = Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .build()
            .new_agent();
        let key = key.map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned);
        Ok(Self { agent, url: url.to_owned(), key })
    }

    /// The address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Takes a look at all of it.
    ///
    /// # Errors
    /// When the host does not answer, or does not answer this key.
    pub fn look(&self) -> Result<Look> {
        let (host, sandboxes) = self.state()?;
        let operations = match host.metrics {
            true => Some(exposition::operations(&self.get("/metrics")?.1)),
            false => None,
        };
        Ok(Look { at: SystemTime::now(), host, sandboxes, operations })
    }

    fn state(&self) -> Result<(HostSummary, Vec<SandboxSummary>)> {
        let (mut sandboxes, mut first) = (Vec::new(), None);
        let mut path = "/ui/state?limit=100".to_owned();
        for _ in 0..PAGES_MAX {
            let (next, text) = self.get(&path)?;
            let page: HostState = serde_json::from_str(&text).with_context(|| {
                format!("{} does not answer as this version of Mica does", self.url)
            })?;
            sandboxes.extend(page.sandboxes);
            first.get_or_insert(page.host);
            match next {
                Some(token) => path = format!("/ui/state?limit=100&nextToken={token}"),
                None => break,
            }
        }
        let host = first.ok_or_else(|| anyhow!("{} gave no page of its state", self.url))?;
        Ok((host, sandboxes))
    }

    /// The token of the next page, if there is one, and the body.
    fn get(&self, path: &str) -> Result<(Option<String>, String)> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("X-API-Key", key);
        }
        let mut response = request.call().map_err(|error| self.unreachable(&error))?;
        self.check(&response)?;
        let next = response.headers().get("x-next-token").and_then(|token| token.to_str().ok());
        let next = next.map(str::to_owned);
        let body = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
        Ok((next, body.with_context(|| format!("{}{path} broke off", self.url))?))
    }

    fn unreachable(&self, error: &ureq::Error) -> anyhow::Error {
        match error {
            ureq::Error::Http(_) | ureq::Error::BadUri(_) => {
                anyhow!("cannot ask {}: {error}; check --url and --api-key", self.url)
            }
            _ => anyhow!(
                "cannot reach {}: {error}; is `mica serve` running there? --url names another host",
                self.url
            ),
        }
    }

    fn check<B>(&self, response: &Response<B>) -> Result<()> {
        let url = &self.url;
        match (response.status().as_u16(), &self.key) {
            (200, _) => Ok(()),
            (401, None) => bail!("{url} wants a key: give one with --api-key or in E2B_API_KEY"),
            (401, Some(_)) => {
                bail!("{url} does not take this key; `mica serve` says where its keys are")
            }
            (404, _) => bail!(
                "{url} does not show its state to this key: it takes one of the operator's tenant, `default`"
            ),
            (status, _) => bail!("{url} answered {status}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_checked_before_anything_is_sent() {
        assert_eq!(Client::new("http://x:1/", None).unwrap().url(), "http://x:1");
        for (bad, says) in
            [("https://x", "no TLS"), ("x:3000", "looks like"), ("http://", "looks like")]
        {
            let error = Client::new(bad, None).unwrap_err().to_string();
            assert!(error.contains(says), "{bad}: {error}");
        }
        assert_eq!(Client::new("http://x", Some(" \n")).unwrap().key, None);
    }
}
