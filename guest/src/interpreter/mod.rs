//! The code interpreter (port 49999): cells of code in, a stream of events out.
//!
//! Called by the agent, which makes one [`Interpreter`] when the template asks for it and adds its
//! routes to the router of that port. Refuses languages that the template has no kernel for, more contexts
//! than [`contexts::CONTEXTS_MAX`] and more waiting cells than [`session::WAITING_CELLS_MAX`].
//!
//! ```text
//!  http ──Job──▶ session (one task per context) ──▶ kernel (one Jupyter kernel process)
//!   ▲                │                                shell, iopub, control: ZeroMQ
//!   └────Event───────┘
//! ```
//! A kernel is a row of data in `languages`, with what is said in its own language in `snippets`;
//! where it listens is in `endpoints`. `protocol` and `events` are pure; `kernel` owns the process and its sockets; `session` decides
//! what runs next and restarts; `cell` follows one cell and interrupts it; `contexts` holds the sessions by id.

mod cell;
mod contexts;
mod endpoints;
mod events;
mod http;
mod kernel;
mod languages;
mod launch;
mod output;
mod protocol;
mod session;
mod snippets;

pub use contexts::{CONTEXTS_MAX, ContextError, Interpreter};
pub use http::add_routes;
pub use launch::{LaunchError, LaunchSpec, Launcher, find_python};
pub(crate) use protocol::hex;
pub use session::WAITING_CELLS_MAX;

/// Where programs are, where the environment does not say.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
