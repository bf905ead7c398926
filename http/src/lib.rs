//! mica-http.
