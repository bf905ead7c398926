//! What is asked of builds.
//!
//! Made by [`crate::route`], which has the paths. Refuses nothing.

/// What is asked for. Ids are as the client wrote them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BuildRoute {
    /// `POST /v3/templates`
    Announce,
    /// `GET /templates/{template}/files/{hash}`
    Files(String, String),
    /// `PUT /build-files/{token}`: the only one without a key.
    Upload(String),
    /// `POST /v2/templates/{template}/builds/{build}`
    Start(String, String),
    /// `GET /templates/{template}/builds/{build}/status`
    Status(String, String),
    /// `GET /templates/{template}/builds/{build}/logs`
    Logs(String, String),
    /// `POST /templates/tags`
    AssignTags,
    /// `DELETE /templates/tags`
    RemoveTags,
    /// `GET /templates/{template}/tags`
    Tags(String),
    /// `GET /templates/{template}/tags/count`
    TagCount(String),
    /// `GET /templates/{template}/tags/exists`
    TagExists(String),
    /// `GET /templates/{template}/tags/groups`
    TagGroups(String),
    /// `GET /templates/{template}/tags/{tag}/assignments`
    TagAssignments(String, String),
}
