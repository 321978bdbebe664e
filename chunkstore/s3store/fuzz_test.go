package s3store

import (
	"strings"
	"testing"
)

// FuzzProfiles reads any file of credentials, and any answer of a service that
// gives them: both halves of a key, or none.
func FuzzProfiles(f *testing.F) {
	for _, s := range []string{
		"[default]\naws_access_key_id = a\naws_secret_access_key=s3cret\n", "[profile default]\nAWS_ACCESS_KEY_ID=a", "[default]\nrole_arn = r", "[default", "[]\n=", "",
		`{"AccessKeyId":"a","SecretAccessKey":"s3cret","Token":"t","Expiration":"2026-01-02T03:04:05Z"}`, `{"Expiration":"soon"}`, `null`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		profiles := parseProfiles(b)
		for name := range profiles {
			if strings.Contains(name, "s3cret") {
				return // names may be shown
			}
		}
		fromFile, ok, err := profiles.credentials("default", "file")
		if ok != (err == nil) || ok && (fromFile.AccessKey == "" || fromFile.SecretKey == "") || err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("of a file: %v, %v", ok, err)
		}
		answered, ok, err := parseRole("service", b)
		if ok != (err == nil) || ok && (answered.AccessKey == "" || answered.SecretKey == "") || err != nil && strings.Contains(err.Error(), "s3cret") {
			t.Errorf("of a service: %v, %v", ok, err)
		}
	})
}
