//! Who may reach a sandbox, and whom it may reach: in E2B's spelling and in CubeSandbox's.
//!
//! Read and written by `http`. Refuses nothing: what is in bounds, `http` decides.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// `network` of a create, the body of `PUT /sandboxes/{id}/network`, and what `GET` shows of it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase")]
pub struct NetworkConfig {
    /// Whether its ports take visitors without the traffic token. Absent: yes; in an update: as it is.
    #[serde(alias = "allow_public_traffic", skip_serializing_if = "Option::is_none")]
    pub allow_public_traffic: Option<bool>,
    /// Addresses, networks and domains that it may reach.
    #[serde(alias = "allow_out", skip_serializing_if = "Option::is_none")]
    pub allow_out: Option<Vec<String>>,
    /// Addresses and networks that it may not.
    #[serde(alias = "deny_out", skip_serializing_if = "Option::is_none")]
    pub deny_out: Option<Vec<String>>,
    /// What its servers see as `Host`; `${PORT}` stands for the port. Absent in an update: as it is.
    #[serde(alias = "mask_request_host", skip_serializing_if = "Option::is_none")]
    pub mask_request_host: Option<String>,
    /// In an update alone. Absent: yes.
    #[serde(
        rename = "allow_internet_access",
        alias = "allowInternetAccess",
        skip_serializing_if = "Option::is_none"
    )]
    pub allow_internet_access: Option<bool>,
    /// Servers for its names. Kept and shown, not applied.
    #[serde(alias = "dns_servers", skip_serializing_if = "Option::is_none")]
    pub dns_servers: Option<Vec<String>>,
    /// Ports whose servers speak TLS. Kept and shown, not applied.
    #[serde(alias = "https_ports", skip_serializing_if = "Option::is_none")]
    pub https_ports: Option<Vec<u16>>,
    /// Rules for its requests: CubeSandbox's list of [`EgressRule`], or E2B's map from domains to lists
    /// of [`HeaderRule`]. Kept and shown, not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<serde_json::Value>,
    /// A proxy for its requests: refused, since they would go around it.
    #[serde(alias = "egress_proxy", skip_serializing)]
    pub egress_proxy: Option<serde_json::Value>,
}

/// One of CubeSandbox's rules: the first that matches decides.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EgressRule {
    /// Its name.
    pub name: String,
    /// Which requests. All of it has to fit.
    #[serde(rename = "match", default)]
    pub matches: EgressMatch,
    /// What becomes of them.
    pub action: EgressAction,
}

/// Which requests a rule is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EgressMatch {
    /// The name in the TLS greeting.
    pub sni: Option<String>,
    /// The `Host`.
    pub host: Option<String>,
    /// The methods.
    pub method: Option<Vec<String>>,
    /// The path.
    pub path: Option<String>,
    /// `http` or `https`.
    pub scheme: Option<String>,
    /// The port. Needs `scheme`.
    pub port: Option<u16>,
}

/// What becomes of requests that a rule is about.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct EgressAction {
    /// Whether they may go.
    pub allow: bool,
    /// What is written down of them: `full`, `metadata` or `none`.
    pub audit: Option<String>,
}

/// One of E2B's rules for a domain.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HeaderRule {
    /// What is changed of requests.
    pub transform: Option<HeaderTransform>,
}

/// What E2B's rules change of requests.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HeaderTransform {
    /// Headers that are added.
    pub headers: Option<BTreeMap<String, String>>,
}
