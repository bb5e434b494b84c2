// Package page is the demo page: two people register or log in, write to each other, and see each
// message go from pending over acked to delivered. It is plain HTML, CSS and JavaScript modules, used
// as they are, and loads nothing from other hosts. static/app.js lists the element ids that tests
// rely on.
package page
