//! A fleet that is not there: arrivals replayed against planned hosts, one event after the other.
//!
//! Called by `mica lab simulate`. `trace` is who arrives when, `service` what a create takes, `policy` who chooses
//! the host, `host` what a host does with it, `planned` a host as a plan has it, `simulate` the order of events, `report` what came of it. The registry
//! that chooses is the product's own. Refuses to read a clock or a random device: one seed is one report, to the byte.

pub mod command;
mod host;
mod planned;
mod policy;
mod random;
mod report;
mod service;
mod simulate;
#[cfg(test)]
mod tests;
mod trace;

pub use host::HostShape;
pub use policy::Policy;
pub use report::{Outcome, json, table};
pub use service::Service;
pub use simulate::{Scenario, simulate};
pub use trace::{Arrival, Load, TEMPLATES_MAX, Trace};
