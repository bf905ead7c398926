//! Files of the sandbox: `filesystem.Filesystem` and `/files`.
mod time;
pub use time::rfc3339;
