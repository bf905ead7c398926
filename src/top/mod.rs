//! `mica top`: a running host in a terminal, or one frame of it as text.
//!
//! Called by `main`. Asks the host's API like any client, with a key of the operator's. Refuses to change anything
//! on the host.

mod client;
mod exposition;
mod model;
mod numbers;
mod render;

use std::io::{IsTerminal, Write, stdout};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SyncSender, TryRecvError, channel, sync_channel,
};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::widgets::{Paragraph, Widget};
use ratatui::{DefaultTerminal, Frame};

use client::Client;
use model::{Look, Screen, SortBy};

/// How long a key press may wait for the screen to notice.
const TICK: Duration = Duration::from_millis(100);

/// Width of `--once` where `COLUMNS` does not say.
const ONCE_COLUMNS: u16 = 120;

/// Sandboxes that `--once` lists at most.
const ONCE_SANDBOXES_MAX: usize = 20;

/// Everything `mica top` can be told.
#[derive(Args, Debug)]
pub struct TopArgs {
    /// Where the host is.
    #[arg(long, value_name = "URL", env = "E2B_API_URL", default_value = "http://127.0.0.1:3000")]
    url: String,
    /// A key of the operator's tenant. A host that was started with --open needs none.
    #[arg(long, value_name = "KEY", env = "E2B_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Seconds from one look to the next.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=3600))]
    interval: u16,
    /// What sandboxes are ordered by.
    #[arg(long, value_enum, default_value_t = SortBy::Memory)]
    sort: SortBy,
    /// Print one frame as plain text and end. Needs no terminal.
    #[arg(long)]
    once: bool,
}

/// Runs it.
///
/// # Errors
/// When the host cannot be reached or does not take the key, and where there is no terminal.
pub fn run(args: &TopArgs) -> Result<()> {
    let client = Client::new(&args.url, args.api_key.as_deref())?;
    let mut screen = Screen::new(client.url().to_owned(), args.sort);
    // The first look is worth more than a screen: what is wrong is said where it can be read.
    screen.take(client.look()?);
    if args.once {
        return print(&screen);
    }
    if !stdout().is_terminal() {
        bail!("standard output is no terminal; `mica top --once` prints a frame as text");
    }
    let looks = Looks::start(client, Duration::from_secs(args.interval.into()))?;
    let mut terminal = ratatui::try_init().context("cannot take the terminal over")?;
    let shown = show(&mut terminal, &mut screen, &looks);
    ratatui::try_restore().context("cannot give the terminal back; `reset` does")?;
    shown
}

/// The frame as text, without colours and without blanks at the ends of lines.
fn print(screen: &Screen) -> Result<()> {
    let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    let text = render::plain(screen, columns.unwrap_or(ONCE_COLUMNS), ONCE_SANDBOXES_MAX);
    stdout().write_all(text.as_bytes()).context("cannot write to standard output")
}

/// Looks at the host, taken on a thread of their own: a host that hangs does not keep a key from working.
struct Looks {
    taken: Receiver<Result<Look>>,
    /// Dropped, it ends the thread.
    _stop: SyncSender<()>,
}

impl Looks {
    fn start(client: Client, interval: Duration) -> Result<Self> {
        let (give, taken) = channel();
        let (_stop, stopped) = sync_channel(0);
        let work = move || {
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                if give.send(client.look()).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("top-looks".to_owned()).spawn(work).context("a thread")?;
        Ok(Self { taken, _stop })
    }

    /// Gives the screen what is new. Whether there was anything.
    fn take(&self, screen: &mut Screen) -> Result<bool> {
        let mut any = false;
        loop {
            match self.taken.try_recv() {
                Ok(Ok(look)) => screen.take(look),
                Ok(Err(error)) => screen.failed(format!("{error:#}")),
                Err(TryRecvError::Empty) => return Ok(any),
                Err(TryRecvError::Disconnected) => bail!("the thread that asks the host has ended"),
            }
            any = true;
        }
    }
}

/// Shows frames until the user has seen enough.
fn show(terminal: &mut DefaultTerminal, screen: &mut Screen, looks: &Looks) -> Result<()> {
    let mut drawn: Option<Instant> = None;
    loop {
        let new = looks.take(screen)?;
        if new || drawn.is_none() {
            terminal.draw(|frame| draw(frame, screen)).context("cannot draw")?;
            drawn = Some(Instant::now());
        }
        if !event::poll(TICK).context("cannot read keys")? {
            continue;
        }
        match event::read().context("cannot read keys")? {
            Event::Key(key) if key.kind == KeyEventKind::Press => match meaning(key) {
                Some(Wish::Quit) => return Ok(()),
                Some(Wish::Sort(by)) => screen.sort_by(by),
                None => {}
            },
            _ => {}
        }
        drawn = None;
    }
}

fn draw(frame: &mut Frame, screen: &Screen) {
    let area = frame.area();
    let lines = render::lines(screen, area.width, area.height.into());
    Paragraph::new(lines).render(area, frame.buffer_mut());
}

/// What a key stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Quit,
    Sort(SortBy),
}

fn meaning(key: KeyEvent) -> Option<Wish> {
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('c') if control => Some(Wish::Quit),
        KeyCode::Char('q') | KeyCode::Esc => Some(Wish::Quit),
        KeyCode::Char('m') => Some(Wish::Sort(SortBy::Memory)),
        KeyCode::Char('c') => Some(Wish::Sort(SortBy::Cpu)),
        KeyCode::Char('w') => Some(Wish::Sort(SortBy::WrongNode)),
        KeyCode::Char('a') => Some(Wish::Sort(SortBy::Age)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_mean_what_the_last_line_says() {
        let key = |c, modifiers| meaning(KeyEvent::new(KeyCode::Char(c), modifiers));
        let none = KeyModifiers::NONE;
        assert_eq!(key('q', none), Some(Wish::Quit));
        assert_eq!(key('c', KeyModifiers::CONTROL), Some(Wish::Quit));
        assert_eq!(key('c', none), Some(Wish::Sort(SortBy::Cpu)));
        assert_eq!(key('w', none), Some(Wish::Sort(SortBy::WrongNode)));
        assert_eq!(key('x', none), None);
    }
}
