//! The code interpreter (port 49999): cells of code in, a stream of events out.
//!
//! Called by the agent, which makes one [`Interpreter`] when the template asks for it and adds its
//! routes to the router of that port. Refuses languages other than Python, more contexts than
//! [`contexts::CONTEXTS_MAX`] and more waiting cells than [`session::WAITING_CELLS_MAX`].
//!
//! ```text
//!  http ──Job──▶ session (one task per context) ──▶ kernel (one ipykernel process)
//!   ▲                │                                shell, iopub: ZeroMQ over unix sockets
//!   └────Event───────┘
//! ```
//! `protocol` and `events` are pure; `kernel` owns the process and its sockets; `session` decides
//! what runs next and restarts; `cell` follows one cell and interrupts it; `contexts` holds the sessions by id.

mod cell;
mod contexts;
mod events;
mod http;
mod kernel;
mod launch;
mod protocol;
mod session;

pub use contexts::{CONTEXTS_MAX, ContextError, Interpreter};
pub use http::add_routes;
pub use launch::{LaunchError, LaunchSpec, Launcher, find_python};
pub(crate) use protocol::hex;
pub use session::WAITING_CELLS_MAX;

/// The language of every context until there are others.
const PYTHON: &str = "python";
