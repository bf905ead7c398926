//! What a client of a host waits for: the tables of published reports, run against any host.
//!
//! Called by `mica bench`. `host` is the host, as a client sees it; `load` is many clients at once; each module of
//! `tables` measures one table and fills a `table` with `row`s; `usage` is what the processors did meanwhile. `document` is the report that a run leaves,
//! `compare` and `ab` hold two of them against each other, `promises` holds one against what the project promises.
//! Nothing else judges. Refuses to be more than a client of what it measures.

pub mod bootstrap;
pub mod compare;
pub mod cube;
pub mod daemon;
pub mod document;
pub mod guest;
pub mod host;
pub mod html;
pub mod inside;
pub mod load;
pub mod phases;
pub mod promises;
pub mod row;
pub mod seeds;
pub mod side;
pub mod table;
pub mod tables;
pub mod usage;
