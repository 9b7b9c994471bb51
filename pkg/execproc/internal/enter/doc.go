// Package enter starts one command in an existing container through a small static program,
// program/enter.c, which joins the container and becomes the command. The package knows how to run
// that program and what to tell it; what is right for a container is its caller's business.
//
// The program is compiled by "make build" (gcc, static) and embedded. A build without it works, and
// says ErrNotBuilt.
package enter
