// Package adminpage is the page for operators on the admin port: plain HTML from templates, a style sheet
// and a script, used as they are. It shows what AdminService says, and loads nothing from elsewhere.
//
// The whole page is rendered here. The script asks for the parts that change again and again, rendered by
// the same templates, and puts them in place; it keeps the token for this tab, sends it as a header with
// each request to act, and draws what only two looks can tell: rates. Without it the page is a picture of
// one moment. Acting is none of this package's business: the script calls the routes of the admin port.
package adminpage
