//! Hot restart: a process hands its listening sockets to its successor, and leaves when that serves.
//!
//! The sockets themselves change hands (`SCM_RIGHTS`), since whatever waits in the queue of one that is closed would be
//! reset. Both meet at an abstract Unix socket that is named by user and base id; each proves to the other, by the
//! kernel, that it runs as the same user. It belongs to a network namespace, as the ports do.
//!
//! ```text
//! successor                             predecessor
//! hello <version>            -->
//!                            <--    welcome <version> <epoch> <sockets>
//!                            <--    sockets, up to 64 a message, with their roles
//! (is configured, then accepts)
//! serving <seconds>          -->
//!                            <--    leaving
//! ```
//!
//! Until the last step nothing has changed for the predecessor: a successor that fails before may be tried again.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt,
};

/// What both must speak. A change of the messages, or of what roles mean, is a new version.
pub const VERSION: u32 = 1;
/// Sockets in one message; the kernel takes 253.
const BATCH: usize = 64;
/// A process has a listener for each port and worker; more than this is no list of ours.
const MAX_SOCKETS: usize = 65_536;
/// Longest message.
const MAX_TEXT: usize = 16 * 1024;
/// How long one waits for the other's next word, where nothing but the other's attention is needed for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A listening socket and what it is for, such as `listener` or `admin`.
#[derive(Debug)]
pub struct Socket {
    /// A word.
    pub role: String,
    /// The socket.
    pub fd: OwnedFd,
}

/// Why a process cannot take over, or be taken over.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// A system call failed.
    #[error("{0}")]
    Io(String, #[source] io::Error),
    /// Another user's process has the name.
    #[error(
        "the process behind base id {base_id} runs as user {theirs}, this one as {ours}: use another --base-id"
    )]
    User {
        /// The base id.
        base_id: u32,
        /// Its user.
        theirs: u32,
        /// This process's user.
        ours: u32,
    },
    /// The other speaks another version.
    #[error(
        "the running process speaks version {theirs} of the handover, this one {VERSION}, so that it cannot be taken \
         over: stop it (SIGTERM), then start this one"
    )]
    Version {
        /// Its version.
        theirs: String,
    },
    /// The other said no.
    #[error("the running process refuses: {0}")]
    Refused(String),
    /// The other said something else than was expected, or nothing.
    #[error("the other process of the handover {0}")]
    Protocol(String),
}

fn io_error(what: &str) -> impl FnOnce(rustix::io::Errno) -> HandoverError {
    move |e| HandoverError::Io(what.to_owned(), e.into())
}

fn name(base_id: u32) -> Result<SocketAddrUnix, HandoverError> {
    let user = rustix::process::getuid().as_raw();
    SocketAddrUnix::new_abstract_name(format!("flotilla-restart-{user}-{base_id}").as_bytes())
        .map_err(io_error("the handover's address"))
}

fn endpoint() -> Result<OwnedFd, HandoverError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(io_error("a socket for the handover"))
}

fn same_user(fd: &OwnedFd, base_id: u32) -> Result<(), HandoverError> {
    let peer = sockopt::socket_peercred(fd).map_err(io_error("who the other process is"))?;
    let (theirs, ours) = (peer.uid.as_raw(), rustix::process::geteuid().as_raw());
    if theirs == ours { Ok(()) } else { Err(HandoverError::User { base_id, theirs, ours }) }
}

fn patience(fd: &OwnedFd, limit: Option<Duration>) -> Result<(), HandoverError> {
    for t in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        sockopt::set_socket_timeout(fd, t, limit).map_err(io_error("a time limit"))?;
    }
    Ok(())
}

fn send(fd: &OwnedFd, text: &str, sockets: &[&Socket]) -> Result<(), HandoverError> {
    let fds: Vec<_> = sockets.iter().map(|s| s.fd.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(HandoverError::Protocol("would get too many sockets at once".into()));
    }
    rustix::net::sendmsg(fd, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)
        .map(drop)
        .map_err(io_error("the other process of the handover is gone"))
}

fn receive(fd: &OwnedFd) -> Result<(String, Vec<OwnedFd>), HandoverError> {
    let mut text = vec![0; MAX_TEXT];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let r =
        rustix::net::recvmsg(fd, &mut [IoSliceMut::new(&mut text)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .map_err(io_error("the other process of the handover does not answer"))?;
    let mut fds = Vec::new();
    for m in control.drain() {
        if let RecvAncillaryMessage::ScmRights(all) = m {
            fds.extend(all);
        }
    }
    if r.bytes == 0 {
        return Err(HandoverError::Protocol("is gone".into()));
    }
    if r.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(HandoverError::Protocol("sent more than fits".into()));
    }
    text.truncate(r.bytes);
    let text = String::from_utf8(text).map_err(|_| HandoverError::Protocol("sent no text".into()))?;
    Ok((text, fds))
}

/// The process that is to be taken over; it serves until [`Predecessor::replace`].
#[derive(Debug)]
pub struct Predecessor {
    fd: OwnedFd,
    /// Its restart epoch.
    pub epoch: u32,
}

impl Predecessor {
    /// Asks the process behind a base id for its sockets; `None` if there is none. Blocks.
    ///
    /// # Errors
    /// There is one, and it cannot be taken over.
    pub fn ask(base_id: u32) -> Result<Option<(Self, Vec<Socket>)>, HandoverError> {
        let fd = endpoint()?;
        match rustix::net::connect(&fd, &name(base_id)?) {
            Err(rustix::io::Errno::CONNREFUSED | rustix::io::Errno::NOENT) => return Ok(None),
            r => r.map_err(io_error("the running process cannot be reached"))?,
        }
        same_user(&fd, base_id)?;
        patience(&fd, Some(PATIENCE))?;
        send(&fd, &format!("hello {VERSION}"), &[])?;
        let (welcome, _) = receive(&fd)?;
        if let Some(why) = welcome.strip_prefix("refused ") {
            return Err(HandoverError::Refused(why.to_owned()));
        }
        let mut words = welcome.split(' ');
        let (first, version) = (words.next(), words.next().unwrap_or_default());
        if first != Some("welcome") || version != VERSION.to_string() {
            return Err(HandoverError::Version { theirs: version.to_owned() });
        }
        let mut number = || words.next().and_then(|w| w.parse::<u32>().ok());
        let (Some(epoch), Some(count)) = (number(), number()) else {
            return Err(HandoverError::Protocol(format!("said {welcome:?}")));
        };
        let count = count as usize;
        if count > MAX_SOCKETS {
            return Err(HandoverError::Protocol(format!("announces {count} sockets")));
        }
        let mut sockets = Vec::with_capacity(count);
        while sockets.len() < count {
            let (roles, fds) = receive(&fd)?;
            let roles: Vec<&str> = roles.split(' ').collect();
            if fds.is_empty() || roles.len() != fds.len() {
                return Err(HandoverError::Protocol("sent sockets without saying which".into()));
            }
            let all = roles.into_iter().zip(fds);
            sockets.extend(all.map(|(role, fd)| Socket { role: role.to_owned(), fd }));
        }
        Ok(Some((Self { fd, epoch }, sockets)))
    }

    /// Tells it that this process serves, and that it must be gone within `limit`. Blocks until it no longer accepts.
    ///
    /// # Errors
    /// It did not answer.
    pub fn replace(self, limit: Duration) -> Result<(), HandoverError> {
        send(&self.fd, &format!("serving {}", limit.as_secs()), &[])?;
        match receive(&self.fd)?.0.as_str() {
            "leaving" => Ok(()),
            other => Err(HandoverError::Protocol(format!("said {other:?}"))),
        }
    }
}

/// Waits for a successor.
#[derive(Debug)]
pub struct Successors {
    fd: OwnedFd,
    base_id: u32,
    epoch: u32,
}

/// Role of the socket at which the next successor asks.
const CONTROL: &str = "handover";

impl Successors {
    /// Listens under a base id. After a takeover the socket is among those that were handed over, and is taken from
    /// there.
    ///
    /// # Errors
    /// Another process listens there.
    pub fn listen(base_id: u32, epoch: u32, handed: &mut Vec<Socket>) -> Result<Self, HandoverError> {
        if let Some(at) = handed.iter().position(|s| s.role == CONTROL) {
            return Ok(Self { fd: handed.swap_remove(at).fd, base_id, epoch });
        }
        let fd = endpoint()?;
        rustix::net::bind(&fd, &name(base_id)?)
            .map_err(io_error(&format!("base id {base_id} is in use by another process")))?;
        rustix::net::listen(&fd, 4).map_err(io_error("cannot wait for a successor"))?;
        Ok(Self { fd, base_id, epoch })
    }

    /// Waits until a successor serves; how long this process may then take to leave. Call `left` when nothing is
    /// accepted any more. `sockets` makes duplicates of what is handed over. Blocks, for ever if nobody comes.
    ///
    /// # Errors
    /// The socket can no longer be waited at.
    pub fn wait(&self, sockets: &dyn Fn() -> Result<Vec<Socket>, String>) -> Result<Leave, HandoverError> {
        loop {
            let fd = match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC) {
                Ok(fd) => fd,
                Err(rustix::io::Errno::INTR) => continue,
                Err(e) => return Err(io_error("cannot wait for a successor")(e)),
            };
            match self.hand_over(fd, sockets) {
                Ok(leave) => return Ok(leave),
                Err(error) => tracing::warn!(%error, "a successor came and failed; this process goes on"),
            }
        }
    }

    fn hand_over(
        &self,
        fd: OwnedFd,
        sockets: &dyn Fn() -> Result<Vec<Socket>, String>,
    ) -> Result<Leave, HandoverError> {
        same_user(&fd, self.base_id)?;
        patience(&fd, Some(PATIENCE))?;
        let (hello, _) = receive(&fd)?;
        // Whoever came compares the versions, and says to its user what to do.
        let version = hello.strip_prefix("hello ").unwrap_or_default();
        let mut all = match sockets() {
            Ok(all) if version == VERSION.to_string() => all,
            Ok(_) => vec![],
            Err(why) => {
                send(&fd, &format!("refused {why}"), &[])?;
                return Err(HandoverError::Refused(why));
            }
        };
        let control = self.fd.try_clone().map_err(|e| HandoverError::Io("a duplicate".into(), e))?;
        all.push(Socket { role: CONTROL.to_owned(), fd: control });
        send(&fd, &format!("welcome {VERSION} {} {}", self.epoch, all.len()), &[])?;
        if version != VERSION.to_string() {
            return Err(HandoverError::Version { theirs: version.to_owned() });
        }
        let all: Vec<&Socket> = all.iter().collect();
        for batch in all.chunks(BATCH) {
            let roles: Vec<&str> = batch.iter().map(|s| s.role.as_str()).collect();
            send(&fd, &roles.join(" "), batch)?;
        }
        // It gets its configuration now, for as long as that takes; if it ends, so does the connection.
        patience(&fd, None)?;
        let (serving, _) = receive(&fd)?;
        let limit = serving.strip_prefix("serving ").and_then(|s| s.parse().ok());
        let Some(limit) = limit else { return Err(HandoverError::Protocol(format!("said {serving:?}"))) };
        Ok(Leave { fd, limit: Duration::from_secs(limit) })
    }
}

/// A successor serves: this process is to leave.
#[derive(Debug)]
pub struct Leave {
    fd: OwnedFd,
    /// The most that it may take.
    pub limit: Duration,
}

impl Leave {
    /// Tells the successor that nothing is accepted here any more.
    pub fn confirm(self) {
        if let Err(error) = send(&self.fd, "leaving", &[]) {
            tracing::warn!(%error, "the successor did not wait");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, net::TcpListener, sync::mpsc};

    use super::*;

    /// Ids of this process's tests: tests of others run beside them.
    fn id(n: u32) -> u32 {
        1_000_000 + std::process::id() % 100_000 * 10 + n
    }

    fn tcp(l: &TcpListener, n: usize) -> Vec<Socket> {
        let one = || Socket { role: "listener".into(), fd: l.try_clone().unwrap().into() };
        (0..n).map(|_| one()).collect()
    }

    #[test]
    fn sockets_change_hands_and_then_the_predecessor_leaves() {
        assert!(Predecessor::ask(id(0)).unwrap().is_none());
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = l.local_addr().unwrap();
        let (tx, left) = mpsc::channel();
        let first = Successors::listen(id(0), 7, &mut vec![]).unwrap();
        let waiting = std::thread::spawn(move || {
            // More than one message holds.
            let leave = first.wait(&|| Ok(tcp(&l, 150))).unwrap();
            assert_eq!(leave.limit, Duration::from_secs(30));
            drop((l, first));
            tx.send(()).unwrap();
            leave.confirm();
        });
        // One that fails changes nothing.
        drop(Predecessor::ask(id(0)).unwrap().unwrap());
        let (p, mut sockets) = Predecessor::ask(id(0)).unwrap().unwrap();
        assert_eq!((p.epoch, sockets.len()), (7, 151));
        let next = Successors::listen(id(0), 8, &mut sockets).unwrap();
        assert_eq!(sockets.len(), 150);
        // Waits in the queue of the socket while that changes hands.
        let mut client = std::net::TcpStream::connect(address).unwrap();
        p.replace(Duration::from_secs(30)).unwrap();
        assert!(left.try_recv().is_ok(), "it confirmed before it left");
        waiting.join().unwrap();
        let ours = TcpListener::from(sockets.pop().unwrap().fd);
        let (accepted, _) = ours.accept().unwrap();
        drop(accepted);
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        drop(next);
        assert!(Predecessor::ask(id(0)).unwrap().is_none());
    }

    #[test]
    fn other_versions_are_told_what_to_do() {
        let first = Successors::listen(id(1), 0, &mut vec![]).unwrap();
        let e = Successors::listen(id(1), 0, &mut vec![]).unwrap_err();
        assert!(e.to_string().contains("in use"), "{e}");
        std::thread::spawn(move || {
            let _ = first.wait(&|| Err("it has a trunk".into()));
        });
        let e = Predecessor::ask(id(1)).unwrap_err();
        assert!(e.to_string().contains("refuses: it has a trunk"), "{e}");
        // A predecessor of the future.
        let fd = endpoint().unwrap();
        rustix::net::bind(&fd, &name(id(2)).unwrap()).unwrap();
        rustix::net::listen(&fd, 1).unwrap();
        std::thread::spawn(move || {
            let c = rustix::net::accept_with(&fd, SocketFlags::CLOEXEC).unwrap();
            receive(&c).unwrap();
            send(&c, "welcome 2 0 0", &[]).unwrap();
        });
        let e = Predecessor::ask(id(2)).unwrap_err().to_string();
        assert!(e.contains("version 2") && e.contains("SIGTERM"), "{e}");
    }
}
