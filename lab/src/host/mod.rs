//! The emulated dual-socket host: images, QEMU, the exec channel and the verbs of `mica-lab`.
//!
//! The binary `mica-lab` calls `up`, `down` and friends here. The order of a start is: check the
//! programs (apt), build or reuse the image (image), make this start's drives (drives), start QEMU
//! (qemu), wait for the exec channel (channel), start the daemon (daemon), wait for its health.
//! What is remembered between commands is one directory per lab name (state).

pub mod apt;
pub mod channel;
pub mod daemon;
pub mod down;
pub mod drives;
pub mod ensure;
pub mod foreground;
pub mod image;
pub mod keys;
pub mod options;
pub mod progress;
pub mod qemu;
pub mod qmp;
pub mod run;
pub mod state;
pub mod status;
pub mod template;
pub mod up;
