//! The whole daemon over its socket: the real `mica serve`, two shards, and the stand-in VM.
//!
//! Run by `cargo test`, as root (VM processes get users of their own). Refuses nothing: where the
//! machine cannot run it, it fails and says why.

#![forbid(unsafe_code)]
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a test says what it expected and stops there"
)]

mod awake;
mod bad_input;
mod builds;
mod client;
mod cold;
mod conflicts;
mod control_plane;
mod copies;
mod daemon;
mod doctor;
mod drain;
mod exposition;
mod full_disk;
mod h2_client;
mod idempotency;
mod keys;
mod lifecycle;
mod listed;
mod metrics;
mod observe;
mod openapi;
mod pausing;
mod profiles;
mod programs;
mod proxy_faults;
mod proxy_framing;
mod proxy_h2;
mod proxy_kept;
mod proxy_memory;
mod proxy_origin;
mod proxy_private;
mod proxy_routing;
mod proxy_stops;
mod proxy_streaming;
mod proxy_tls;
mod proxy_upgrade;
mod quotas;
mod renaming;
#[path = "../../guest/tests/required/mod.rs"]
mod required;
mod resources;
mod series;
mod sizes;
mod snapshots;
mod tags;
mod template;
mod tenants;
mod top;
mod two_tenants;
mod upstream;
