//! Who may reach a sandbox and whom it may reach: from what clients wish, and back.
//!
//! Called by [`super`] for creates and for `PUT /sandboxes/{id}/network`. Refuses addresses and names
//! out of form, rules that contradict one another, and a proxy for the sandbox's requests, which they
//! would go around.

use std::collections::BTreeMap;
use std::net::IpAddr;

use mica_shards::NetworkPolicy;
use mica_wire::api::{EgressRule, HeaderRule, NetworkConfig};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::json;
use crate::error::ApiError;

/// Entries of one list.
const ENTRIES_MAX: usize = 512;
/// Characters of one entry: a domain name has no more.
const ENTRY_CHARS_MAX: usize = 253;
/// Characters of a masked host.
const MASK_CHARS_MAX: usize = 512;
/// Bytes of the rules, as JSON.
const RULES_BYTES_MAX: usize = 64 * 1024;

/// Both denies of everything.
const EVERYTHING: [&str; 2] = ["0.0.0.0/0", "::/0"];

/// Names in [`NetworkPolicy::unapplied`].
const DNS_SERVERS: &str = "dnsServers";
const HTTPS_PORTS: &str = "httpsPorts";
const RULES: &str = "rules";

/// What a create wishes for.
///
/// # Errors
/// 400, naming the field and what to write in it.
pub fn of_create(
    wanted: Option<NetworkConfig>,
    internet: Option<bool>,
) -> Result<NetworkPolicy, ApiError> {
    let wanted = wanted.unwrap_or_default();
    let internet = internet.or(wanted.allow_internet_access);
    policy(NetworkPolicy::default(), wanted, internet)
}

/// What the body of an update makes of a policy: everything is replaced but who may reach the sandbox,
/// which stays unless it is said.
///
/// # Errors
/// As [`of_create`].
pub fn replaced(now: NetworkPolicy, body: &[u8]) -> Result<NetworkPolicy, ApiError> {
    let wanted: NetworkConfig = json::read_or_default(body)?;
    let internet = wanted.allow_internet_access;
    policy(now, wanted, internet)
}

fn policy(
    now: NetworkPolicy,
    wanted: NetworkConfig,
    internet: Option<bool>,
) -> Result<NetworkPolicy, ApiError> {
    if wanted.egress_proxy.is_some() {
        return Err(ApiError::bad_request(
            "`egressProxy` is not supported by this version: requests would go around it; leave \
             it out",
        ));
    }
    let (allow_out, deny_out) =
        (wanted.allow_out.unwrap_or_default(), wanted.deny_out.unwrap_or_default());
    let allow_internet_access = internet.unwrap_or(true);
    bounded("allowOut", &allow_out)?;
    bounded("denyOut", &deny_out)?;
    if let Some(bad) = deny_out.iter().find(|entry| !is_network(entry)) {
        return Err(bad_entry("denyOut", bad, "an IP address or a network such as 10.0.0.0/8"));
    }
    let mut names = allow_out.iter().filter(|entry| !is_network(entry));
    let denies_all =
        !allow_internet_access || deny_out.iter().any(|entry| EVERYTHING.contains(&entry.as_str()));
    if let Some(bad) = names.clone().find(|entry| !is_domain(entry)) {
        return Err(bad_entry("allowOut", bad, "an IP address, a network or a domain name"));
    }
    if let Some(name) = names.next().filter(|_| !denies_all) {
        return Err(ApiError::bad_request(format!(
            "`allowOut` has the domain {name:?}, which means something only where all else is \
             denied; set `allow_internet_access` to false or put \"0.0.0.0/0\" into `denyOut`"
        )));
    }
    let mask_request_host = match wanted.mask_request_host {
        Some(mask) => Some(checked_mask(mask)?).filter(|mask| !mask.is_empty()),
        None => now.mask_request_host,
    };
    let unapplied = unapplied(wanted.dns_servers, wanted.https_ports, wanted.rules)?;
    Ok(NetworkPolicy {
        allow_public_traffic: wanted.allow_public_traffic.unwrap_or(now.allow_public_traffic),
        mask_request_host,
        allow_internet_access,
        allow_out,
        deny_out,
        unapplied,
    })
}

fn unapplied(
    dns_servers: Option<Vec<String>>,
    https_ports: Option<Vec<u16>>,
    rules: Option<serde_json::Value>,
) -> Result<BTreeMap<String, String>, ApiError> {
    let mut kept = BTreeMap::new();
    if let Some(servers) = dns_servers.filter(|servers| !servers.is_empty()) {
        bounded(DNS_SERVERS, &servers)?;
        if let Some(bad) = servers.iter().find(|server| server.parse::<IpAddr>().is_err()) {
            return Err(bad_entry(DNS_SERVERS, bad, "an IP address"));
        }
        keep(&mut kept, DNS_SERVERS, &servers)?;
    }
    if let Some(ports) = https_ports.filter(|ports| !ports.is_empty()) {
        if ports.len() > ENTRIES_MAX || ports.contains(&0) {
            let message = format!("`{HTTPS_PORTS}` must be {ENTRIES_MAX} ports at most, none 0");
            return Err(ApiError::bad_request(message));
        }
        keep(&mut kept, HTTPS_PORTS, &ports)?;
    }
    if let Some(rules) = rules.filter(|rules| !rules.is_null()) {
        check_rules(&rules)?;
        keep(&mut kept, RULES, &rules)?;
    }
    Ok(kept)
}

fn keep(
    kept: &mut BTreeMap<String, String>,
    name: &str,
    value: &impl Serialize,
) -> Result<(), ApiError> {
    let text = serde_json::to_string(value).map_err(|_| ApiError::internal())?;
    if text.len() > RULES_BYTES_MAX {
        let message = format!("`{name}` is longer than {RULES_BYTES_MAX} bytes; send less");
        return Err(ApiError::bad_request(message));
    }
    kept.insert(name.to_owned(), text);
    Ok(())
}

/// CubeSandbox's list, or E2B's map.
fn check_rules(rules: &serde_json::Value) -> Result<(), ApiError> {
    let bad = |why: String| ApiError::bad_request(format!("`{RULES}`: {why}"));
    match rules {
        serde_json::Value::Array(list) if list.len() <= ENTRIES_MAX => {
            for rule in list {
                let rule: EgressRule = parsed(rule).map_err(bad)?;
                let shown: String = rule.name.chars().take(64).collect();
                if rule.matches.port.is_some() && rule.matches.scheme.is_none() {
                    let why = format!("{shown:?} has a `port` and needs a `scheme` beside it");
                    return Err(bad(why));
                }
                let audits = ["full", "metadata", "none"];
                if rule.action.audit.is_some_and(|audit| !audits.contains(&audit.as_str())) {
                    return Err(bad(format!("{shown:?}: `audit` must be one of {audits:?}")));
                }
            }
            Ok(())
        }
        serde_json::Value::Object(map) if map.len() <= ENTRIES_MAX => {
            for (domain, rules) in map {
                if !is_domain(domain) {
                    let shown: String = domain.chars().take(64).collect();
                    return Err(bad(format!("{shown:?} is no domain name")));
                }
                let _: Vec<HeaderRule> = parsed(rules).map_err(bad)?;
            }
            Ok(())
        }
        _ => Err(bad(format!("it must be a list or an object of {ENTRIES_MAX} entries at most"))),
    }
}

fn parsed<T: DeserializeOwned>(value: &serde_json::Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| error.to_string())
}

fn bounded(name: &str, entries: &[String]) -> Result<(), ApiError> {
    if entries.len() <= ENTRIES_MAX && entries.iter().all(|entry| entry.len() <= ENTRY_CHARS_MAX) {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "`{name}` must be {ENTRIES_MAX} entries of {ENTRY_CHARS_MAX} characters at most"
    )))
}

fn bad_entry(name: &str, entry: &str, form: &str) -> ApiError {
    ApiError::bad_request(format!("`{name}` has {entry:?}, which is not {form}"))
}

fn checked_mask(mask: String) -> Result<String, ApiError> {
    let is_of_host = |b: u8| b.is_ascii_alphanumeric() || b"-._:[]${}".contains(&b);
    if mask.len() <= MASK_CHARS_MAX && mask.bytes().all(is_of_host) {
        return Ok(mask);
    }
    Err(ApiError::bad_request(format!(
        "`maskRequestHost` must be a host name of {MASK_CHARS_MAX} characters at most; \
         `${{PORT}}` stands for the port"
    )))
}

/// An address, or a network.
fn is_network(text: &str) -> bool {
    let (address, bits) = match text.split_once('/') {
        None => return text.parse::<IpAddr>().is_ok(),
        Some(parts) => parts,
    };
    let bits_max = match address.parse() {
        Ok(IpAddr::V4(_)) => 32,
        Ok(IpAddr::V6(_)) => 128,
        Err(_) => return false,
    };
    let digits = !bits.is_empty() && bits.bytes().all(|b| b.is_ascii_digit());
    digits && bits.parse().is_ok_and(|bits: u32| bits <= bits_max)
}

/// A domain name, also `*` or one that begins with `*.`.
fn is_domain(text: &str) -> bool {
    let is_label = |label: &str| {
        matches!(label.len(), 1..=63)
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    let name = text.strip_prefix("*.").unwrap_or(text);
    // What looks like an address is one out of form.
    let is_number = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    text == "*" || (text.len() <= ENTRY_CHARS_MAX && !is_number && name.split('.').all(is_label))
}

/// A policy, as clients read it.
pub fn shown(policy: &NetworkPolicy) -> NetworkConfig {
    let list = |entries: &Vec<String>| Some(entries.clone()).filter(|list| !list.is_empty());
    NetworkConfig {
        allow_public_traffic: Some(policy.allow_public_traffic),
        allow_out: list(&policy.allow_out),
        deny_out: list(&policy.deny_out),
        mask_request_host: policy.mask_request_host.clone(),
        dns_servers: kept(policy, DNS_SERVERS),
        https_ports: kept(policy, HTTPS_PORTS),
        rules: kept(policy, RULES),
        ..NetworkConfig::default()
    }
}

fn kept<T: DeserializeOwned>(policy: &NetworkPolicy, name: &str) -> Option<T> {
    let text = policy.unapplied.get(name)?;
    serde_json::from_str(text)
        .inspect_err(|error| tracing::error!(name, %error, "a kept wish does not parse"))
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn update(body: &serde_json::Value) -> Result<NetworkPolicy, ApiError> {
        replaced(NetworkPolicy::default(), body.to_string().as_bytes())
    }

    #[test]
    fn both_spellings_say_the_same() {
        let e2b = update(&json!({ "allowPublicTraffic": false, "allowOut": ["1.1.1.1", "a.dev"],
            "denyOut": ["0.0.0.0/0"], "maskRequestHost": "x:${PORT}",
            "allow_internet_access": false }));
        let cube =
            update(&json!({ "allow_public_traffic": false, "allow_out": ["1.1.1.1", "a.dev"],
            "deny_out": ["0.0.0.0/0"], "mask_request_host": "x:${PORT}",
            "allowInternetAccess": false }));
        let e2b = e2b.unwrap();
        assert_eq!(e2b, cube.unwrap());
        assert!(!e2b.allow_public_traffic && !e2b.allow_internet_access);
        assert_eq!(e2b.mask_request_host.as_deref(), Some("x:${PORT}"));
    }

    #[test]
    fn an_update_replaces_all_but_who_may_come_in() {
        let now = NetworkPolicy {
            allow_public_traffic: false,
            mask_request_host: Some("x".to_owned()),
            allow_internet_access: false,
            allow_out: vec!["a.dev".to_owned()],
            ..NetworkPolicy::default()
        };
        let then = replaced(now.clone(), br#"{"denyOut":["10.0.0.0/8"]}"#).unwrap();
        assert!(!then.allow_public_traffic && then.allow_internet_access);
        assert_eq!((then.allow_out.len(), then.deny_out.len()), (0, 1));
        assert_eq!(then.mask_request_host.as_deref(), Some("x"));
        let opened = replaced(now, br#"{"allowPublicTraffic":true,"maskRequestHost":""}"#).unwrap();
        assert!(opened.allow_public_traffic && opened.mask_request_host.is_none());
    }

    #[test]
    fn what_is_kept_is_shown_as_it_was() {
        for rules in [
            json!([{ "name": "r", "match": { "host": "a.dev", "scheme": "https", "port": 443 },
                "action": { "allow": true, "audit": "full", "inject": [] } }]),
            json!({ "*.a.dev": [{ "transform": { "headers": { "X-A": "b" } } }] }),
        ] {
            let wish = json!({ "rules": rules, "dnsServers": ["1.1.1.1"], "httpsPorts": [8443] });
            let shown = serde_json::to_value(shown(&update(&wish).unwrap())).unwrap();
            assert_eq!(shown["rules"], rules);
            assert_eq!(shown["dnsServers"], wish["dnsServers"]);
            assert_eq!(shown["httpsPorts"], wish["httpsPorts"]);
        }
    }

    #[test]
    fn contradictions_and_bad_entries_are_refused() {
        for bad in [
            json!({ "allowOut": ["example.org"] }),
            json!({ "allowOut": ["not a name"], "allow_internet_access": false }),
            json!({ "allowOut": ["300.1.1.1"], "allow_internet_access": false }),
            json!({ "denyOut": ["example.org"] }),
            json!({ "denyOut": ["10.0.0.0/33"] }),
            json!({ "denyOut": ["10.0.0.0/+8"] }),
            json!({ "allowOut": vec!["1.1.1.1"; 513] }),
            json!({ "maskRequestHost": "x".repeat(513) }),
            json!({ "maskRequestHost": "a\r\nb" }),
            json!({ "egressProxy": { "address": "1.1.1.1:1" } }),
            json!({ "dnsServers": ["a.dev"] }),
            json!({ "httpsPorts": [0] }),
            json!({ "rules": 7 }),
            json!({ "rules": [{ "name": "r", "match": { "port": 1 }, "action": { "allow": true } }] }),
            json!({ "rules": [{ "name": "r", "action": {} }] }),
            json!({ "rules": [{ "name": "r", "action": { "allow": true, "audit": "all" } }] }),
            json!({ "rules": { "a b": [] } }),
            json!({ "rules": { "a.dev": [{ "transform": 1 }] } }),
            json!({ "allowOut": [], "allow_out": [] }),
        ] {
            assert!(update(&bad).is_err(), "{bad}");
        }
    }
}
