//! The languages that a cell can be in, and the kernels that run them: a kernel is a row of data.
//!
//! Read by [`super::contexts`], which finds the row of a language, and by [`super::session`] and
//! [`super::kernel`], which do what its kernel's row says. Starts nothing. Refuses no name: what is
//! not in the table has no row.

use super::snippets::{self, Snippets};

/// One language.
#[derive(Debug)]
pub struct Language {
    /// Its name in contexts.
    pub name: &'static str,
    /// Other names that clients give it.
    aliases: &'static [&'static str],
    pub kind: &'static Kind,
}

/// One kernel program.
#[derive(Debug)]
pub struct Kind {
    /// What people call it.
    pub display: &'static str,
    /// The language of the context that cells without a context run in.
    pub default_language: &'static str,
    /// The program: Python itself, or one that is searched beside Python and in `PATH`.
    pub program: Program,
    pub args: &'static [Arg],
    pub transport: Transport,
    pub interrupt: Interrupt,
    /// After so many interrupts that it does not give way to, the kernel is replaced.
    pub interrupts_max: u32,
    /// Environment that is the kernel's own and no cell's wish.
    pub env: &'static [(&'static str, &'static str)],
    /// Run silently when the kernel is up.
    pub begin: &'static str,
    /// Cells that are run before the kernel is saved with the guest, and the text they must give.
    pub rehearsals: &'static [(&'static str, Option<&'static str>)],
    /// Run silently after each of them.
    pub settle: &'static str,
    /// How environment and random state are kept right.
    pub upkeep: Upkeep,
    /// Whether what the process itself writes to its standard output is the cell's output.
    pub shows_own_stdout: bool,
    /// E2B starts such a kernel at home when its directory is not there, and does not refuse.
    pub may_miss_cwd: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Program {
    Python,
    Named(&'static str),
}

/// One argument of a kernel's program.
#[derive(Clone, Copy, Debug)]
pub enum Arg {
    Text(&'static str),
    /// A file of ours, by the name it gets beside the connection file.
    File(&'static str, &'static str),
    /// The path of the connection file.
    Connection,
    /// A file that a package put below `share/jupyter`.
    Shared(&'static str),
}

/// What a kernel can listen on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Unix sockets, where it knows them.
    Ipc,
    Tcp,
}

/// How a kernel is told to give up its cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// SIGINT to its process group.
    Signal,
    /// A message on its control channel.
    Message,
}

/// How environment and random state of a kernel are changed.
#[derive(Clone, Copy, Debug)]
pub enum Upkeep {
    /// Our own part of the kernel reads the orders in the metadata of the cell's message.
    Orders,
    /// Code in the kernel's own language, in silent cells around the client's.
    Code(&'static Snippets),
}

static PYTHON: Kind = Kind {
    display: "Python",
    default_language: "python",
    program: Program::Python,
    args: &[
        Arg::File("kernel.py", include_str!("kernel.py")),
        Arg::Text("-f"),
        Arg::Connection,
        // Kernels would share one history file, each writing to the disk for every cell.
        Arg::Text("--HistoryManager.hist_file=:memory:"),
    ],
    transport: Transport::Ipc,
    interrupt: Interrupt::Signal,
    interrupts_max: 12,
    env: &[
        // Python would otherwise hold back what a child process prints after it.
        ("PYTHONUNBUFFERED", "1"),
        ("MPLBACKEND", "module://matplotlib_inline.backend_inline"),
    ],
    // IPython makes a few things at its first cell only; now they are made before anyone waits.
    begin: "pass",
    rehearsals: &[("1+1", Some("2")), ("__import__('_mica').warm()", None)],
    settle: "__import__('_mica').settle()",
    upkeep: Upkeep::Orders,
    shows_own_stdout: false,
    may_miss_cwd: true,
};

static DENO: Kind = Kind {
    display: "Deno",
    default_language: "javascript",
    program: Program::Named("deno"),
    args: &[Arg::Text("jupyter"), Arg::Text("--kernel"), Arg::Text("--conn"), Arg::Connection],
    transport: Transport::Tcp,
    interrupt: Interrupt::Message,
    // A loop gives way to the first one. Code that awaits gives way to none.
    interrupts_max: 2,
    // Results are for programs: without colours. A cell's own children do not inherit it, see
    // `begin`.
    env: &[("NO_COLOR", "1"), ("DENO_NO_UPDATE_CHECK", "1")],
    begin: snippets::DENO_BEGIN,
    rehearsals: &[("1+1", Some("2")), ("((x: number) => x + 1)(2)", Some("3"))],
    settle: "",
    upkeep: Upkeep::Code(&snippets::DENO),
    shows_own_stdout: true,
    may_miss_cwd: false,
};

static BASH: Kind = Kind {
    display: "bash",
    default_language: "bash",
    program: Program::Python,
    args: &[
        // Not with `-m`: a file in the working directory would be imported in place of a module.
        Arg::Text("-I"),
        Arg::Text("-c"),
        Arg::Text(
            "from ipykernel.kernelapp import IPKernelApp; from bash_kernel.kernel import \
             BashKernel; IPKernelApp.launch_instance(kernel_class=BashKernel)",
        ),
        Arg::Text("-f"),
        Arg::Connection,
    ],
    transport: Transport::Ipc,
    interrupt: Interrupt::Signal,
    interrupts_max: 3,
    env: &[],
    begin: "true",
    rehearsals: &[],
    settle: "",
    upkeep: Upkeep::Code(&snippets::BASH),
    shows_own_stdout: false,
    may_miss_cwd: false,
};

static R: Kind = Kind {
    display: "R",
    default_language: "r",
    program: Program::Named("R"),
    args: &[
        Arg::Text("--no-save"),
        Arg::Text("--no-restore"),
        Arg::Text("--no-echo"),
        Arg::Text("-e"),
        Arg::Text("IRkernel::main()"),
        Arg::Text("--args"),
        Arg::Connection,
    ],
    transport: Transport::Tcp,
    interrupt: Interrupt::Signal,
    interrupts_max: 3,
    env: &[],
    begin: "invisible(NULL)",
    rehearsals: &[("1+1", Some("[1] 2"))],
    settle: "",
    upkeep: Upkeep::Code(&snippets::R),
    shows_own_stdout: false,
    may_miss_cwd: false,
};

static JAVA: Kind = Kind {
    display: "Java",
    default_language: "java",
    program: Program::Named("java"),
    args: &[
        Arg::Text("--add-opens"),
        Arg::Text("jdk.jshell/jdk.jshell=ALL-UNNAMED"),
        Arg::Text("-jar"),
        Arg::Shared("kernels/java/jjava.jar"),
        Arg::Connection,
    ],
    transport: Transport::Tcp,
    interrupt: Interrupt::Message,
    interrupts_max: 2,
    env: &[],
    begin: "",
    rehearsals: &[("1+1", Some("2"))],
    settle: "",
    upkeep: Upkeep::Code(&snippets::JAVA),
    shows_own_stdout: false,
    may_miss_cwd: false,
};

static GO: Kind = Kind {
    display: "Go",
    default_language: "go",
    program: Program::Python,
    args: &[
        Arg::File("runner.py", include_str!("runner.py")),
        Arg::Text(
            r#"{"name": "go", "source": "main.go",
                "compile": ["go", "build", "-o", "{program}", "{source}"],
                "run": ["{program}"], "unless": "(?m)^package ", "before": "package main; "}"#,
        ),
        Arg::Text("-f"),
        Arg::Connection,
    ],
    transport: Transport::Ipc,
    interrupt: Interrupt::Signal,
    interrupts_max: 3,
    // There is no C compiler in the template.
    env: &[("CGO_ENABLED", "0")],
    begin: "",
    rehearsals: &[],
    settle: "",
    upkeep: Upkeep::Orders,
    shows_own_stdout: false,
    may_miss_cwd: false,
};

/// Every language, the default one first.
static LANGUAGES: [Language; 7] = [
    Language { name: "python", aliases: &["py", "python3"], kind: &PYTHON },
    Language { name: "javascript", aliases: &["js"], kind: &DENO },
    Language { name: "typescript", aliases: &["ts", "deno"], kind: &DENO },
    Language { name: "bash", aliases: &["sh", "shell"], kind: &BASH },
    Language { name: "r", aliases: &[], kind: &R },
    Language { name: "java", aliases: &[], kind: &JAVA },
    Language { name: "go", aliases: &["golang"], kind: &GO },
];

/// Every language there is a kernel program for.
pub fn all() -> impl Iterator<Item = &'static Language> {
    LANGUAGES.iter()
}

/// The language that a client means; none and empty mean Python.
pub fn find(name: Option<&str>) -> Option<&'static Language> {
    let wanted = name.unwrap_or_default().trim().to_lowercase();
    if wanted.is_empty() {
        return LANGUAGES.first();
    }
    all().find(|row| row.name == wanted || row.aliases.contains(&wanted.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn languages_have_the_names_that_clients_use() {
        for (name, wanted) in [
            (None, "python"),
            (Some(""), "python"),
            (Some("Python"), "python"),
            (Some("js"), "javascript"),
            (Some(" TS "), "typescript"),
            (Some("deno"), "typescript"),
            (Some("R"), "r"),
            (Some("bash"), "bash"),
        ] {
            assert_eq!(find(name).unwrap().name, wanted);
        }
        assert!(find(Some("cobol")).is_none());
    }

    #[test]
    fn no_name_means_two_things_and_every_kernel_has_its_default() {
        let names: Vec<_> =
            all().flat_map(|row| row.aliases.iter().copied().chain([row.name])).collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        for row in all() {
            let default = find(Some(row.kind.default_language)).unwrap();
            assert!(std::ptr::eq(default.kind, row.kind), "{}", row.name);
        }
    }
}
